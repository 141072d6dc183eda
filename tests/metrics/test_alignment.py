"""CLIP score: equal to a direct open_clip computation; loading never guesses and never draws weights."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sjd2_lightning.data.sources.emoji import load_emoji_index, render
from sjd2_lightning.metrics.alignment import (
    CLIPScorer,
    load_clip_scorer,
    own_scores,
    scores_of_others,
)

CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.5, 0.25, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "random"
    path.mkdir()
    config = {"model_cfg": CFG, "preprocess_cfg": {"mean": MEAN, "std": STD}, "name": "RandomCLIP"}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CFG).state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def scorer(folder):
    return load_clip_scorer(folder)


@pytest.fixture(scope="module")
def pairs():
    items = load_emoji_index()[::300]
    return torch.stack([torch.tensor(render(item.path)) for item in items]), [item.caption for item in items]


def scores(scorer, images, captions, **settings):
    """CLIP scores of images with their own captions."""
    return own_scores(scorer.embed_images(images, **settings), scorer.embed_captions(captions))


def test_score_equals_open_clip(scorer, folder, pairs):
    images, captions = pairs
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(image.numpy())) for image in images])
        image_embeds, text_embeds = model.encode_image(pixels), model.encode_text(tokenize(captions))
    expected = 100 * torch.cosine_similarity(image_embeds, text_embeds).clamp(min=0)
    torch.testing.assert_close(scores(scorer, images, captions), expected, rtol=1e-4, atol=1e-4)
    assert (expected > 0).any()


def test_score_does_not_depend_on_the_batch(scorer, pairs):
    images, captions = pairs
    one = scores(scorer, images, captions, batch_size=1)
    torch.testing.assert_close(one, scores(scorer, images, captions), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, scores(scorer, list(images), captions), rtol=1e-4, atol=1e-4)


class Fixed(torch.nn.Module):
    """Reads the colour of the image and the first token of the text as an angle."""

    def encode_image(self, pixels, normalize):
        angle = pixels[:, 0, 0, 0]
        return torch.stack([angle.cos(), angle.sin()], -1)

    def encode_text(self, ids, normalize):
        return torch.stack([ids[:, 0].float().cos(), ids[:, 0].float().sin()], -1)


def fixed_scorer() -> CLIPScorer:
    def preprocess(image):
        return torch.tensor(image.getpixel((0, 0))[0], dtype=torch.float32).view(1, 1, 1)

    return CLIPScorer(Fixed(), preprocess, lambda texts: torch.tensor([[len(t)] for t in texts]), "Fixed")


def test_score_is_a_clamped_cosine_times_100():
    images = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    images[1], images[2] = 1, 3
    found = scores(fixed_scorer(), images, ["", "", ""])
    torch.testing.assert_close(found, 100 * torch.tensor([1.0, torch.cos(torch.tensor(1.0)), 0.0]))


def test_own_minus_other_captions_is_what_reading_them_gains():
    images = torch.zeros(20, 4, 4, 3, dtype=torch.uint8)
    captions = ["a"] * 10 + ["abcd"] * 10  # angles 1 and 4: cosine below 0
    images[:10], images[10:] = 1, 4

    def gain(captions):
        embeds, texts = fixed_scorer().embed_images(images), fixed_scorer().embed_captions(captions)
        return own_scores(embeds, texts) - scores_of_others(embeds, texts, captions)

    assert gain(captions).tolist() == pytest.approx([100] * 20, abs=1e-3)  # also where captions repeat
    uneven = ["a"] * 15 + ["abcd"] * 5
    images[10:15] = 1
    assert gain(uneven).tolist() == pytest.approx([100] * 20, abs=1e-3)
    images[:] = 1
    assert gain(captions).mean() == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="all captions are equal"):
        gain(["a"] * 20)


def test_scores_of_others_are_the_mean_over_all_other_captions(scorer, pairs):
    images, captions = pairs
    captions = [captions[0], *captions[:-1]]  # the first caption twice
    embeds, texts = scorer.embed_images(images), scorer.embed_captions(captions)
    found = scores_of_others(embeds, texts, captions)
    for i, image in enumerate(images):
        others = [caption for caption in captions if caption != captions[i]]
        expected = scores(scorer, image.expand(len(others), -1, -1, -1), others).mean()
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


def test_architecture_with_a_weight_file(tmp_path, monkeypatch, folder, scorer, pairs):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", CFG)
    weights = tmp_path / "mine.pt"
    torch.save(scorer.model.state_dict(), weights)
    loaded = load_clip_scorer("tiny-test", weights)
    assert loaded.name == "tiny-test-mine"
    # the same weights, but a bare architecture brings open_clip's own mean and deviation of pixels
    torch.testing.assert_close(loaded.embed_captions(pairs[1]), scorer.embed_captions(pairs[1]))
    assert scores(loaded, *pairs).shape == (len(pairs[1]),)


class Harm:
    """A pickle that would run code where weights_only were off."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_weights_that_are_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", CFG)
    weights = tmp_path / "bad.pt"
    torch.save({"state_dict": Harm()}, weights)
    with pytest.raises(ValueError, match=r"bad\.pt.*cannot be loaded"):
        load_clip_scorer("tiny-test", weights)


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no open_clip_config\.json"):
        load_clip_scorer(tmp_path)
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="no weights"):
        load_clip_scorer(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_clip_scorer(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_clip_scorer(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load_clip_scorer("weights/none")
    with pytest.raises(ValueError, match="set pretrained"):
        load_clip_scorer("ViT-B-32")
    with pytest.raises(ValueError, match="do not exist"):
        load_clip_scorer("ViT-B-32", tmp_path / "no.pt")
    with pytest.raises(ValueError, match="leave it out"):
        load_clip_scorer(folder, "openai")


def test_bad_images_are_named(scorer, pairs):
    with pytest.raises(ValueError, match="uint8"):
        scorer.embed_images(pairs[0].float())


@pytest.mark.parametrize("fits", [14, 75, 31])
def test_captions_that_clip_cuts_are_counted(scorer, fits):
    """Tokens beside start and end; the shipped CLIP's tokenizer is transformers' and adds an end alone."""
    clip = {
        14: scorer,
        75: CLIPScorer(scorer.model, scorer.preprocess, open_clip.get_tokenizer("ViT-B-32"), "one"),
        31: load_clip_scorer("weights/tiny/clip"),
    }[fits]
    captions = ["a", "a " * fits, "a " * (fits + 1), "a " * 300, "a " * 300]
    assert clip.num_cut(captions) == 2
    assert clip.num_cut(captions[:2]) == 0


@pytest.mark.parametrize("end", ["</s>", "<s>", "<end_of_text>", "<END_OF_TEXT>", "<start_of_text>"])
def test_words_of_a_caption_are_no_control_tokens(scorer, end):
    for clip in (scorer, load_clip_scorer("weights/tiny/clip")):
        one, other = clip.embed_captions([f"a {end} cat", f"a {end} dog"])
        assert (one - other).abs().max() > 1e-3, "what stands behind it is read"
