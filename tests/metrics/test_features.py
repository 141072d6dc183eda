"""Extractors see what they should, and cached features belong to exactly one set of images."""

import pytest
import torch
from cleanfid.resize import make_resizer
from safetensors import torch as safetensors
from torch import nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from sjd2_lightning.data.sources.emoji import load_emoji_index, render
from sjd2_lightning.metrics.features import (
    INCEPTION_FILE,
    EffNetLite0,
    FeatureExtractor,
    InceptionCleanFID,
    cached_features,
    extract_features,
    load_feature_extractor,
)
from sjd2_lightning.metrics.fidelity import frechet_result, kid_result
from sjd2_lightning.run import harmless

NUM = 24


class MeanColour(nn.Module):
    """A fast extractor that counts the images it sees."""

    name, preprocessing, dim, num_features = "MeanColour", "none", 3, 3
    num_seen = 0

    def forward(self, images):
        self.num_seen += len(images)
        return torch.stack([image.float().mean((0, 1)) for image in images])


@pytest.fixture(scope="module")
def emoji_images():
    items = load_emoji_index()
    chosen = items[:: len(items) // (2 * NUM)][: 2 * NUM]
    return torch.stack([torch.tensor(render(item.path)) for item in chosen])


@pytest.fixture(scope="module")
def effnet():
    return EffNetLite0()


@pytest.fixture(scope="module")
def effnet_features(effnet, emoji_images):
    return extract_features(effnet, emoji_images)


def test_features_have_the_promised_form(effnet, effnet_features):
    assert isinstance(effnet, FeatureExtractor)
    assert (effnet_features.extractor, effnet_features.preprocessing) == (
        "EffNetLite0",
        "clean-fid bicubic 224 px",
    )
    assert effnet_features.features.shape == (2 * NUM, 1280)
    assert effnet_features.features.dtype == torch.float32


def test_features_do_not_depend_on_the_batch(effnet, emoji_images, effnet_features):
    small = extract_features(effnet, emoji_images[:5], batch_size=2)
    torch.testing.assert_close(small.features, effnet_features.features[:5], rtol=1e-3, atol=1e-4)
    listed = extract_features(effnet, list(emoji_images[:2]))
    torch.testing.assert_close(listed.features, effnet_features.features[:2], rtol=1e-3, atol=1e-4)


def test_resize_and_scale_are_the_network_s_own(effnet, emoji_images, effnet_features):
    resize = make_resizer("PIL", False, "bicubic", (224, 224))
    pixels = torch.tensor(resize(emoji_images[0].numpy())).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = effnet.network.extract_features((pixels / 255 * 255 - 127) / 128).mean((2, 3))
    torch.testing.assert_close(expected[0], effnet_features.features[0], rtol=1e-3, atol=1e-4)


def test_effnet_tells_clean_from_damaged(effnet, emoji_images, effnet_features):
    reference = effnet_features.features[:NUM]
    clean = effnet_features.features[NUM:]
    floats = emoji_images[NUM:].permute(0, 3, 1, 2).float()
    blurred = F.avg_pool2d(floats, 7, 1, 3, count_include_pad=False)
    patches = F.unfold(floats, 16, stride=16)  # (NUM, 3 * 16 * 16, 16 patches)
    order = torch.randperm(patches.shape[-1], generator=torch.Generator().manual_seed(0))
    shuffled = F.fold(patches[..., order], 64, 16, stride=16)
    wrap = lambda features: type(effnet_features)("EffNetLite0", "r", features)  # noqa: E731
    base = kid_result(wrap(clean), wrap(reference)).value
    base_fd = frechet_result(wrap(clean), wrap(reference), 0).value
    for damaged in (blurred, shuffled):
        images = damaged.round().byte().permute(0, 2, 3, 1)
        features = wrap(extract_features(effnet, images).features)
        worse = kid_result(features, wrap(reference))
        assert worse.interval[0] > base
        assert worse.value > 2 * abs(base)
        assert frechet_result(features, wrap(reference), 0).value > 1.1 * base_fd


def test_torchmetrics_takes_the_extractor_as_it_is(emoji_images):
    metric = FrechetInceptionDistance(feature=MeanColour()).set_dtype(torch.float64)
    metric.update(emoji_images[:NUM], real=True)
    metric.update(emoji_images[NUM:], real=False)
    sets = [extract_features(MeanColour(), part) for part in (emoji_images[NUM:], emoji_images[:NUM])]
    assert frechet_result(*sets, 0).value == pytest.approx(float(metric.compute()), rel=1e-3)


def test_torchmetrics_reads_the_size_of_the_real_extractor(effnet):
    assert FrechetInceptionDistance(feature=effnet).real_features_sum.shape == (1280,)


def test_cache_hits_only_the_same_images_extractor_and_preprocessing(emoji_images, tmp_path):
    extractor = MeanColour()
    first = cached_features(extractor, emoji_images, tmp_path)
    again = cached_features(extractor, list(emoji_images.clone()), tmp_path)
    assert extractor.num_seen == len(emoji_images)
    assert torch.equal(first.features, again.features)
    assert (again.extractor, again.preprocessing) == ("MeanColour", "none")

    changed = emoji_images.clone()
    changed[-1, 0, 0, 0] ^= 1
    cached_features(extractor, changed, tmp_path)
    cached_features(extractor, emoji_images.flip(0), tmp_path)
    cached_features(extractor, emoji_images.reshape(-1, 32, 128, 3), tmp_path)
    extractor.preprocessing = "other"
    cached_features(extractor, emoji_images, tmp_path)
    extractor.name = "Other"
    cached_features(extractor, emoji_images, tmp_path)
    assert extractor.num_seen == 6 * len(emoji_images)
    assert len(list(tmp_path.iterdir())) == 6  # and no temporary file is left


def test_damaged_cache_is_written_anew(emoji_images, tmp_path):
    extractor = MeanColour()
    first = cached_features(extractor, emoji_images, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(cached_features(extractor, emoji_images, tmp_path).features, first.features)
    assert extractor.num_seen == 2 * len(emoji_images)
    cached_features(extractor, emoji_images, tmp_path)
    assert extractor.num_seen == 2 * len(emoji_images)


class FakeInception(nn.Module):
    """Stands for the file of Inception weights: the parts of it that clean-fid calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d((32, 64)), nn.Conv2d(3, 1, 1))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def inception_dir(tmp_path):
    torch.jit.script(FakeInception()).save(tmp_path / INCEPTION_FILE)
    return tmp_path


def test_inception_runs_from_a_local_file(inception_dir, emoji_images):
    extractor = load_feature_extractor("InceptionCleanFID", weights_dir=inception_dir)
    features = extract_features(extractor, emoji_images[:4])
    assert features.features.shape == (4, 2048)
    assert features.preprocessing == "clean-fid bicubic 299 px"
    resized = torch.tensor(make_resizer("PIL", False, "bicubic", (299, 299))(emoji_images[0].numpy()))
    expected = extractor.network(resized.permute(2, 0, 1)[None])
    torch.testing.assert_close(features.features[:1], expected)


def test_missing_inception_says_where_and_what_to_do(tmp_path, monkeypatch):
    def reach_network(*args):
        raise AssertionError("a download without leave")

    monkeypatch.setattr("urllib.request.urlopen", reach_network)
    with pytest.raises(ValueError, match="allow_download=true") as raised:
        InceptionCleanFID(weights_dir=tmp_path)
    assert str(tmp_path / INCEPTION_FILE) in str(raised.value)
    assert "EffNetLite0" in str(raised.value)


def test_download_by_leave_leaves_a_whole_file_or_none(tmp_path, monkeypatch, inception_dir):
    weights = (inception_dir / INCEPTION_FILE).read_bytes()
    target = tmp_path / "weights"

    def download(folder):
        path = torch.hub.os.path.join(folder, INCEPTION_FILE)
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(weights[: len(weights) if whole else 10])
        if not whole:
            raise OSError("connection lost")
        return path

    monkeypatch.setattr("sjd2_lightning.metrics.features.check_download_inception", download)
    whole = False
    with pytest.raises(OSError, match="connection lost"):
        InceptionCleanFID(target, allow_download=True)
    assert list(target.iterdir()) == []
    whole = True
    InceptionCleanFID(target, allow_download=True)
    assert [path.name for path in target.iterdir()] == [INCEPTION_FILE]


def test_bad_images_and_names_are_named(effnet):
    with pytest.raises(ValueError, match=r"image 1 .*uint8"):
        effnet([torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 3)])
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        effnet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no images"):
        extract_features(effnet, [])
    with pytest.raises(ValueError, match="choose EffNetLite0"):
        load_feature_extractor("vgg")


@pytest.mark.parametrize("place", ["file/below", "file", "/dev/null/x"])
def test_a_cache_that_cannot_be_written_to_keeps_nothing_and_says_so(tmp_path, caplog, monkeypatch, place):
    monkeypatch.setattr(harmless, "_said", set())
    (tmp_path / "file").write_text("no folder")
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    found = cached_features(MeanColour(), images, tmp_path / place)
    assert torch.equal(found.features, MeanColour()(images))
    assert f"keeping features in metrics.cache_dir={tmp_path / place} failed" in caplog.text


def test_cached_features_that_are_not_finite_are_made_anew(emoji_images, tmp_path):
    extractor, images = MeanColour(), emoji_images[:3]
    found = cached_features(extractor, images, tmp_path).features
    (path,) = tmp_path.iterdir()
    safetensors.save_file({"features": found * torch.nan}, path)
    assert torch.equal(cached_features(extractor, images, tmp_path).features, found)
    assert extractor.num_seen == 6
