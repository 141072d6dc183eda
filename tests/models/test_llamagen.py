"""LlamaGen: a synthetic release in the published layout is converted; plain definitions are the reference."""

import argparse
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.models.convert import main
from sjd2_lightning.models.convert_llamagen import convert_llamagen
from sjd2_lightning.models.llamagen import LlamaGenTokens, cleaned
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.models.shrunken import shrunken_llamagen
from tests.models.test_convert import block
from tests.tools.conformance import CHECKS, Case
from tests.tools.plain_llamagen import plain_llamagen, published_state

LEVELS = 5


def published_vq() -> dict[str, Tensor]:
    """Weights of VQ-16 by the release's names, 32 channels on every level; attention on the last."""
    rng = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, into: int, out: int, size: int) -> None:
        state[f"{name}.weight"] = (
            torch.randn(out, into, size, size, generator=rng) / (into * size * size) ** 0.5
        )
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(32, generator=rng)
        state[f"{name}.bias"] = 0.1 * torch.randn(32, generator=rng)

    def res(name: str) -> None:
        for number in (1, 2):
            norm(f"{name}.norm{number}")
            conv(f"{name}.conv{number}", 32, 32, 3)

    def attention(name: str) -> None:
        norm(f"{name}.norm")
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", 32, 32, 1)

    for half, num in (("encoder", 2), ("decoder", 3)):
        for place in range(LEVELS):
            name, last = f"{half}.conv_blocks.{place}", place == (LEVELS - 1 if half == "encoder" else 0)
            for number in range(num):
                res(f"{name}.res.{number}")
                if last:
                    attention(f"{name}.attn.{number}")
            if place < LEVELS - 1:
                conv(f"{name}.{'downsample' if half == 'encoder' else 'upsample'}.conv", 32, 32, 3)
        res(f"{half}.mid.0")
        attention(f"{half}.mid.1")
        res(f"{half}.mid.2")
        norm(f"{half}.norm_out")
    conv("encoder.conv_in", 3, 32, 3)
    conv("encoder.conv_out", 32, 16, 3)
    conv("decoder.conv_in", 16, 32, 3)
    conv("decoder.conv_out", 32, 3, 3)
    conv("quant_conv", 16, 8, 1)
    conv("post_quant_conv", 8, 16, 1)
    state["quantize.embedding.weight"] = torch.randn(16384, 8, generator=rng)
    state["quantize.codebook_used"] = torch.zeros(65536)
    return state


class PlainVQ:
    """The published definition, both ways; pixels in [-1, 1]."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.rows = F.normalize(state["quantize.embedding.weight"], dim=-1)

    def conv(self, name: str, x: Tensor, padding: int = 0, stride: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def attend(self, name: str, x: Tensor) -> Tensor:
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view(x.shape))

    def level(self, name: str, x: Tensor) -> Tensor:
        for number in range(3):
            if f"{name}.res.{number}.conv1.weight" in self.state:
                x = block(self.state, f"{name}.res.{number}", x)
            if f"{name}.attn.{number}.q.weight" in self.state:
                x = self.attend(f"{name}.attn.{number}", x)
        return x

    def middle(self, half: str, x: Tensor) -> Tensor:
        x = self.attend(f"{half}.mid.1", block(self.state, f"{half}.mid.0", x))
        return block(self.state, f"{half}.mid.2", x)

    def end(self, half: str, x: Tensor) -> Tensor:
        return self.conv(f"{half}.conv_out", F.silu(self.norm(f"{half}.norm_out", x)), 1)

    def encode(self, pixels: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", pixels, 1)
        for place in range(LEVELS):
            x = self.level(f"encoder.conv_blocks.{place}", x)
            if place < LEVELS - 1:
                x = self.conv(f"encoder.conv_blocks.{place}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 0, 2)
        z = F.normalize(self.conv("quant_conv", self.end("encoder", self.middle("encoder", x))), dim=1)
        return torch.einsum("bchw,kc->bhwk", z, self.rows).argmax(-1)

    def decode(self, codes: Tensor) -> Tensor:
        x = self.conv("post_quant_conv", self.rows[codes].permute(0, 3, 1, 2))
        x = self.middle("decoder", self.conv("decoder.conv_in", x, 1))
        for place in range(LEVELS):
            x = self.level(f"decoder.conv_blocks.{place}", x)
            if place < LEVELS - 1:
                x = self.conv(
                    f"decoder.conv_blocks.{place}.upsample.conv", F.interpolate(x, scale_factor=2.0), 1
                )
        return self.end("decoder", x)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Files as they are published, of a text and a class model, and what they were written from."""
    folder = tmp_path_factory.mktemp("release")
    models = {name: shrunken_llamagen(condition=name) for name in ("text", "class")}
    for name, backbone in models.items():
        content = {"model": published_state(backbone), "steps": 3, "args": argparse.Namespace(lr=1e-4)}
        content["model"]["freqs_cis"] = torch.zeros(4, 4, 2)
        torch.save(content, folder / f"{name}.pt")
    vq = published_vq()
    torch.save({"model": vq}, folder / "vq.pt")
    t5 = folder / "t5"
    models["text"].text_encoder.save_pretrained(t5)
    models["text"].text_tokenizer.save_pretrained(t5)
    return folder, models, vq


@pytest.mark.parametrize("condition", ["text", "class"])
def test_a_release_is_converted(release, tmp_path, condition):
    folder, models, vq = release
    convert = partial(
        convert_llamagen, folder / f"{condition}.pt", folder / "vq.pt", tmp_path, 4, num_heads=2
    )
    made = convert(t5=folder / "t5" if condition == "text" else None)
    assert "trunk/model.safetensors" in made
    assert not convert(t5=folder / "t5" if condition == "text" else None), "what is there is not made again"
    backbone, own = load_backbone("llamagen", tmp_path), models[condition]
    assert backbone.tokens == own.tokens
    for name, value in own.model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], value), name
    layout = backbone.layout(64, 64)
    prompt = {"text": "a cat", "class": "7"}[condition]
    ids = backbone.prompt_ids(prompt, layout)
    for row in (ids, backbone.unconditional_ids(layout, ids)):
        wanted, found = (
            each.embed_prompts(torch.tensor([row]), torch.tensor([0])) for each in (own, backbone)
        )
        assert torch.allclose(found, wanted, atol=1e-6)
    plain = PlainVQ(vq)
    pixels = F.interpolate(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), scale_factor=8)
    codes = backbone.image_tokenizer.encode(pixels)
    assert (codes == plain.encode(pixels * 2 - 1)).float().mean() > 0.9, "but for near ties"
    image = backbone.decode_images(codes)
    assert torch.allclose(image, ((plain.decode(codes) + 1) / 2).clamp(0, 1), atol=1e-4)


@pytest.fixture(scope="module")
def of_classes() -> Case:
    from tests.laws.test_conformance import token_loop

    backbone = shrunken_llamagen(condition="class").requires_grad_(True)
    backbone.image_tokenizer.requires_grad_(False)

    def teacher(prompt_ids, image_ids, layout):
        return plain_llamagen(backbone, prompt_ids, image_ids.flatten().tolist()[:-1])

    draw = token_loop(backbone, partial(plain_llamagen, backbone))
    return Case(backbone, [(64, 64)], [(64, 32)], False, teacher, draw, ("207", "tench"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_model_of_classes_conforms(check, of_classes):
    if check.__name__ in ("check_loss", "check_modes", "check_folder"):
        check(of_classes)
    else:
        with torch.no_grad():
            check(of_classes)


def test_classes_are_numbers_or_names(of_classes):
    backbone = of_classes.backbone
    layout = backbone.layout(64, 64)
    assert backbone.prompt_ids("Golden Retriever", layout) == backbone.prompt_ids(" 207 ", layout) == [207]
    assert backbone.unconditional_ids(layout, [207]) == [1000]
    for wrong in ("a red cat", "1000"):
        with pytest.raises(ValueError, match="drawn from classes; give a number below 1000"):
            backbone.prompt_ids(wrong, layout)


def test_features_of_no_caption_are_the_last_ones(release):
    backbone = release[1]["text"]
    layout = backbone.layout(64, 64)
    ids = backbone.prompt_ids("a cat", layout)
    assert ids[-1] == 1
    assert backbone.unconditional_ids(layout, ids) == list(range(320 + 120 - len(ids), 320 + 120))
    assert backbone.prompt_ids("</s>a <pad> cat</s>", layout) == ids, "words are no control tokens"
    assert not backbone.excess(ids, layout)
    assert "the model reads 120 of T5's features" in backbone.excess([3] * 121, layout)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("A Blue Porsche 356, parked", "a blue porsche 356, parked"),
        ("“Hello” — it's #1", '"hello" - it\'s 1'),
        ("a  cat\n(black) on a mat.", "a cat black on a mat."),
        ("red,green and http://a.b/c blue", "red, green and blue"),
        ("this-is-a-long_name", "this is a long name"),
    ],
)
def test_captions_are_cleaned_as_the_release_cleans_them(written, read):
    assert cleaned(written) == read


def test_what_does_not_fit_is_named(release, tmp_path, capsys):
    folder, models, _ = release
    with pytest.raises(ValueError, match=r"drawn from texts: --t5 needs a folder"):
        convert_llamagen(folder / "text.pt", folder / "vq.pt", tmp_path, 4, num_heads=2)
    with pytest.raises(ValueError, match="16 wide, as no release"):
        convert_llamagen(folder / "class.pt", folder / "vq.pt", tmp_path, 4)
    state = published_state(models["class"])
    state["layers.0.attention.gone.weight"] = state.pop("layers.0.attention.wo.weight")
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(
        ValueError, match=r"unknown layers\.0\.attention\.gone.*missing layers\.0\.attention\.wo"
    ):
        convert_llamagen(tmp_path / "bad.pt", folder / "vq.pt", tmp_path, 4, num_heads=2)
    with pytest.raises(SystemExit):
        main(["--gpt", str(folder / "class.pt"), "--out", str(tmp_path)])
    assert "give --trunk and --vqgan, or --gpt and --vq" in capsys.readouterr().err
    with pytest.raises(ValueError, match="T5's encoder is for texts"):
        type(models["text"])(
            models["text"].model,
            models["text"].text_tokenizer,
            models["text"].image_tokenizer,
            LlamaGenTokens(),
            None,
        )
