"""DINOv2 and CLIP's image tower see what was published, and their distances equal plain implementations."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import linalg
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)

from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.metrics.features import FeatureExtractor, FeatureSet, extract_features
from sjd2_lightning.metrics.fidelity import cmmd_result, frechet_result
from sjd2_lightning.metrics.vision import CLIPVision, DINOv2
from tests.tools.small_scorers import SIDE, pictures, small_clip, small_dinov2


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return DINOv2(small_dinov2(tmp_path_factory.mktemp("dinov2")), "owner/dino@v1")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return CLIPVision(small_clip(tmp_path_factory.mktemp("clip")), "owner/clip")


def test_dinov2_is_the_normalised_cls_token_of_the_whole_picture(dinov2, tmp_path):
    network = Dinov2Model.from_pretrained(small_dinov2(tmp_path)).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for shape in ((224, 224), (300, 260)):
        image = pictures(1, 320)[0, : shape[0], : shape[1]]
        # the published evaluation: the whole picture to 224 x 224 by PIL
        small = np.asarray(Image.fromarray(image.numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        pixels = (torch.tensor(small).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            wanted = network(pixel_values=pixels[None]).last_hidden_state[0, 0]
        found = dinov2(image[None])[0]
        rounding = 1e-4 if shape == (224, 224) else 0.03  # PIL rounds to 8 bits, clean-fid's resizer does not
        assert (found - wanted).abs().max() < rounding * wanted.abs().max()
    assert isinstance(dinov2, FeatureExtractor)
    assert (dinov2.name, dinov2.dim) == ("DINOv2", 32)


def test_a_whole_clip_is_read_without_a_word(tmp_path, capfd):
    small_clip(tmp_path)
    capfd.readouterr()
    CLIPVision(tmp_path, "x")
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_clip_embeds_the_middle_square_as_its_processor_does(clip, tmp_path):
    network = CLIPVisionModelWithProjection.from_pretrained(small_clip(tmp_path)).eval()
    prepare = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_normalize=True
    )
    for image in (pictures(1, SIDE)[0], pictures(1, 200)[0, :100]):
        pixels = prepare(images=[image.permute(2, 0, 1)], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            wanted = torch.nn.functional.normalize(network(pixel_values=pixels).image_embeds, dim=-1)[0]
        found = clip(image[None])[0]
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)
        assert (found - wanted).abs().max() < (1e-5 if len(image) == SIDE else 0.03)


def test_fd_dinov2_equals_numpy_and_scipy(dinov2):
    sets = [extract_features(dinov2, pictures(num, 224, seed)) for num, seed in ((8, 0), (6, 1))]
    x, y = (found.features.double().numpy() for found in sets)
    covariances = [np.cov(rows, rowvar=False) for rows in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    found = frechet_result(*sets, 50)
    assert found.name == "fd_DINOv2"
    assert found.value == pytest.approx(wanted, rel=1e-4)
    assert found.interval[0] <= found.value <= found.interval[1]
    for said in ("owner/dino@v1", "licence of the release Apache-2.0", "6 reference images", "NOT the size"):
        assert said in found.protocol


def plain_mmd(x: torch.Tensor, y: torch.Tensor, with_itself: bool) -> float:
    """Squared MMD by loops; with or without the pairs of an image with itself."""

    def mean(a, b, same):
        values = [
            math.exp(-sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) / 200)
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not same or with_itself or i != j
        ]
        return sum(values) / len(values)

    a, b = x.double().tolist(), y.double().tolist()
    return 1000 * (mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False))


def test_cmmd_equals_a_double_loop(clip):
    sets = [extract_features(clip, pictures(num, SIDE, seed)) for num, seed in ((9, 0), (7, 1))]
    rows = [found.features for found in sets]
    found = cmmd_result(*sets, 50)
    assert found.value == pytest.approx(plain_mmd(*rows, False), rel=1e-6, abs=1e-7)
    assert found.interval[0] <= found.interval[1]
    # what the published program adds, as the docstring says
    within = [1 - plain_kernel_mean(part) for part in rows]
    added = sum(1000 * part / len(own) for part, own in zip(within, rows, strict=True))
    assert plain_mmd(*rows, True) - found.value == pytest.approx(added, rel=1e-6)
    assert "Gaussian kernel, sigma 10, times 1000, unbiased" in found.protocol
    assert (found.name, found.num_images) == ("CMMD", 9)
    assert found.flags[0].startswith("N = 9 < 2048")


def plain_kernel_mean(rows: torch.Tensor) -> float:
    """Mean kernel of two different images."""
    values = [
        math.exp(-float((u - v).square().sum()) / 200)
        for i, u in enumerate(rows.double())
        for j, v in enumerate(rows.double())
        if i != j
    ]
    return sum(values) / len(values)


def test_cmmd_tells_sets_apart_and_needs_two_images(clip):
    one, other = (extract_features(clip, pictures(24, SIDE, seed)) for seed in (0, 1))
    far = extract_features(clip, pictures(24, SIDE, 2) // 8)
    assert abs(cmmd_result(one, other, 0).value) < cmmd_result(one, far, 0).value
    alone = FeatureSet(one.extractor, one.preprocessing, one.features[:1])
    with pytest.raises(ValueError, match="CMMD needs 2 images a set; got 1 and 24"):
        cmmd_result(alone, other)


def test_an_evaluation_has_both(dinov2, clip, tmp_path):
    images = pictures(8, SIDE, 5)
    keys = tuple(f"p{number}" for number in range(8))
    reference = ReferenceSet("r", keys, ("a",) * 8, pictures(8, SIDE, 6))
    metrics = QualityMetrics([dinov2], embedder=clip, num_distance_resamples=5, cache_dir=tmp_path)
    measured = QualityMeter(metrics, reference).measure(list(images), ["a"] * 8).measured
    sets = [extract_features(clip, part) for part in (images, reference.images)]
    assert measured["cmmd"].value == pytest.approx(cmmd_result(*sets, 0).value, abs=1e-9)
    assert measured["fd"].name == "fd_DINOv2"
    assert {"kid", "precision"} <= measured.keys()
    assert "(weights " in measured["cmmd"].protocol
    assert len(list(tmp_path.iterdir())) == 2, "features of the real images are kept"


def test_weights_that_do_not_fit_are_named(tmp_path):
    small_dinov2(tmp_path / "dino")
    with pytest.raises(ValueError, match="a model of type dinov2, where clip or clip_vision_model is needed"):
        CLIPVision(tmp_path / "dino", "x")
    weights = tmp_path / "dino/model.safetensors"
    state = load_file(weights)
    state.pop("layernorm.bias")
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, the first is layernorm\.bias; download it"):
        DINOv2(tmp_path / "dino", "x")
    weights.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be loaded"):
        DINOv2(tmp_path / "dino", "x")
    (tmp_path / "dino/config.json").write_text(json.dumps({"model_type": "dinov2"}))
    weights.unlink()
    with pytest.raises(ValueError, match="where a release has pickles alone"):
        DINOv2(tmp_path / "dino", "x")
