"""Conversion of synthetic checkpoints; references are transformers and a plain decoder written here."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from sjd2_lightning.models.chameleon import LUMINA_MGPT
from sjd2_lightning.models.convert import convert, main
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.models.released_files import MANIFEST, read_pickle
from sjd2_lightning.models.small import byte_tokenizer, code_name
from sjd2_lightning.models.taming import vq_from_taming

NUM_CODES = 12
CHANNELS = [32, 64]


def block(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """taming's ResnetBlock, straight from its published definition."""

    def conv(part: str, value: Tensor, padding: int = 1) -> Tensor:
        return F.conv2d(value, state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"], padding=padding)

    def norm(part: str, value: Tensor) -> Tensor:
        return F.silu(
            F.group_norm(value, 32, state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"], 1e-6)
        )

    hidden = conv("conv2", norm("norm2", conv("conv1", norm("norm1", x))))
    return hidden + (conv("nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in state else x)


def reference_decode(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Pixels in [-1, 1] of codes (B, H, W): middle with attention, then blocks from the top down."""

    def conv(name: str, value: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(value, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def norm(name: str, value: Tensor) -> Tensor:
        return F.group_norm(value, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = conv("post_quant_conv", state["quantize.embedding.weight"][ids].permute(0, 3, 1, 2))
    x = block(state, "decoder.mid.block_1", conv("decoder.conv_in", x, 1))
    attention = "decoder.mid.attn_1"
    q, k, v = (conv(f"{attention}.{part}", norm(f"{attention}.norm", x)).flatten(2) for part in "qkv")
    weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
    x = x + conv(f"{attention}.proj_out", (v @ weights.transpose(1, 2)).view(x.shape))
    x = block(state, "decoder.mid.block_2", x)
    for level in reversed(range(len(CHANNELS))):
        for place in range(2):
            x = block(state, f"decoder.up.{level}.block.{place}", x)
        if level:
            x = conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0), 1)
    return conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)), 1)


def decoder_weights(rng: torch.Generator) -> dict[str, Tensor]:
    """Random weights under taming's names; ch_mult [1, 2], one block and one more going up."""
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, into: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=rng) / (into * size**2) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=rng)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=rng)

    def resnet(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    low, high = CHANNELS
    conv("decoder.conv_in", high, 4, 3)
    resnet("decoder.mid.block_1", high, high)
    norm("decoder.mid.attn_1.norm", high)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"decoder.mid.attn_1.{part}", high, high, 1)
    resnet("decoder.mid.block_2", high, high)
    for place in range(2):
        resnet(f"decoder.up.1.block.{place}", high, high)
        resnet(f"decoder.up.0.block.{place}", low if place else high, low)
    conv("decoder.up.1.upsample.conv", high, high, 3)
    norm("decoder.norm_out", low)
    conv("decoder.conv_out", 3, low, 3)
    return state


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(transformers' model, folder): the trunk as released, in two shards, and vqgan.ckpt."""
    torch.manual_seed(0)
    config = ChameleonConfig(
        vocab_size=9100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocabulary_map={"<image>": 8711, **{code_name(code): 4 + code for code in range(NUM_CODES)}},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": NUM_CODES,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
        },
    )
    model = ChameleonForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("original")
    released = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.vqmodel."):
            continue
        if "_norm." in name and "self_attn" in name:
            row = torch.randn(1, value.shape[1], generator=torch.Generator().manual_seed(len(released)))
            value.copy_(row.expand_as(value))
            value = row
        released[name] = value.clone().contiguous()
    halves = sorted(released)
    for number, names in enumerate((halves[::2], halves[1::2])):
        part = {name: released[name] for name in names}
        save_file(part, folder / f"model-{number + 1:05d}-of-00002.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    byte_tokenizer(8820, {"<s>": 0}).save_pretrained(folder)
    prefix = "model.vqmodel."
    encoder = {
        name.removeprefix(prefix): value
        for name, value in model.state_dict().items()
        if name.startswith(prefix)
    }
    rng = torch.Generator().manual_seed(1)
    vqgan = encoder | decoder_weights(rng) | {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": vqgan}, folder / "vqgan.ckpt")
    return model, folder


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    made = convert(original[1], original[1] / "vqgan.ckpt", out)
    return out, made


def test_the_trunk_is_the_same(original, converted):
    backbone = load_backbone("chameleon", converted[0])
    ids = torch.randint(9100, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = original[0].model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = backbone.model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.allclose(hidden, wanted, atol=1e-6)
    assert backbone.tokens == LUMINA_MGPT
    plain, info = ChameleonForConditionalGeneration.from_pretrained(
        converted[0] / "trunk", output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(plain.lm_head.weight, original[0].lm_head.weight)


def test_the_image_tokenizer_is_the_same_both_ways(original, converted):
    """Encoding against transformers' Chameleon, decoding against the reference above."""
    backbone = load_backbone("chameleon", converted[0])
    rng = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, 8, 12, generator=rng)
    with torch.no_grad():
        wanted = original[0].model.vqmodel.encode(images * 2 - 1, return_dict=True).image_tokens
    assert torch.equal(backbone.image_tokenizer.encode(images), wanted.view(2, 4, 6))
    ids = torch.randint(NUM_CODES, (2, 4, 6), generator=rng)
    state = torch.load(original[1] / "vqgan.ckpt", weights_only=True)["state_dict"]
    pixels = ((reference_decode(state, ids) + 1) / 2).clamp(0, 1)
    assert pixels.std() > 0.05
    assert torch.allclose(backbone.decode_images(ids), pixels, atol=1e-5)


def test_nothing_is_made_twice_and_what_is_missing_is_made(original, converted, tmp_path):
    out, made = converted
    assert len(made) == 9
    again = convert(original[1], original[1] / "vqgan.ckpt", out)
    assert again == []
    manifest = json.loads((out / MANIFEST).read_text())["files"]
    assert sorted(manifest) == sorted(made)
    (out / "trunk" / "model-00002-of-00003.safetensors").unlink()
    before = (out / "trunk" / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    again = convert(original[1], original[1] / "vqgan.ckpt", out)
    assert again == ["trunk/model-00002-of-00003.safetensors"]
    assert (out / "trunk" / "model-00001-of-00003.safetensors").stat().st_mtime_ns == before
    assert not list(out.rglob(".*.part"))


def copy_of(folder, target):
    """The original folder under links, so that one file can be replaced."""
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    return target


def replace(path, state) -> None:
    path.unlink()
    save_file(state, path, {"format": "pt"})


def test_unknown_and_missing_weights_of_the_trunk_are_named(original, tmp_path):
    folder = copy_of(original[1], tmp_path)
    shard = folder / "model-00001-of-00002.safetensors"
    state = load_file(shard)
    lost = sorted(state)[-1]
    replace(shard, {name: value for name, value in state.items() if name != lost} | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"unknown extra; missing {lost}"):
        convert(folder, folder / "vqgan.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lost", "extra", "message"),
    [
        (
            "decoder.mid.attn_1.q.bias",
            None,
            r"lacks the weights of decoder\.mid_block\.attentions\.0\.to_q\.bias",
        ),
        (
            None,
            "encoder.down.1.attn.0.gone.weight",
            r"unknown weights .*encoder\.down\.1\.attn\.0\.gone\.weight",
        ),
        ("quant_conv.weight", None, r"no checkpoint of a VQGAN: quant_conv\.weight missing"),
    ],
)
def test_unknown_and_missing_weights_of_the_tokenizer_are_named(original, lost, extra, message):
    state = read_pickle(original[1] / "vqgan.ckpt")
    state.pop(lost, None)
    if extra:
        state[extra] = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        vq_from_taming(state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(original, tmp_path, value):
    folder = copy_of(original[1], tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    state = load_file(shard)
    name = sorted(state)[2]
    state[name].flatten()[-1] = value
    replace(shard, state)
    with pytest.raises(
        ValueError, match=rf"00002-of-00002\.safetensors: the weight {name} holds NaN or infinity"
    ):
        convert(folder, folder / "vqgan.ckpt", tmp_path / "out")
    assert not (tmp_path / "out" / "trunk" / "model-00002-of-00003.safetensors").exists()
    taming = read_pickle(folder / "vqgan.ckpt")
    taming["decoder.conv_in.bias"][0] = value
    torch.save(taming, tmp_path / "hurt.ckpt")
    with pytest.raises(ValueError, match=r"hurt\.ckpt: the weight decoder\.conv_in\.bias holds"):
        convert(folder, tmp_path / "hurt.ckpt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def with_index(folder) -> None:
    """Writes the index of the two shards."""
    shards = sorted(folder.glob("model-*.safetensors"))
    weight_map = {name: path.name for path in shards for name in load_file(path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_no_part_of_the_model_is_not_read(original, converted, tmp_path, indexed):
    folder = copy_of(original[1], tmp_path)
    if indexed:
        with_index(folder)
        save_file({"lm_head.weight": torch.zeros(9100, 16)}, folder / "zz_old.safetensors")
    for name in ("adapter_model.safetensors", "consolidated.00.safetensors"):
        save_file({"lm_head.weight": torch.zeros(9100, 16)}, folder / name)
    for name in ("training_args.bin", "optimizer.bin"):
        torch.save({"lm_head.weight": torch.zeros(2)}, folder / name)
    convert(folder, folder / "vqgan.ckpt", tmp_path / "out")
    paths = sorted((tmp_path / "out" / "trunk").glob("*.safetensors"))
    assert [path.name for path in paths] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for path in paths:
        wanted = load_file(converted[0] / "trunk" / path.name)
        assert all(torch.equal(value, wanted[name]) for name, value in load_file(path).items())


def test_pickles_are_read_by_their_index_too(original, converted, tmp_path):
    folder = copy_of(original[1], tmp_path)
    weight_map = {}
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        name = f"pytorch_model-{number}.bin"
        torch.save(load_file(path), folder / name)
        weight_map |= dict.fromkeys(load_file(path), name)
        path.unlink()
    torch.save({"lm_head.weight": torch.zeros(9100, 16)}, folder / "old.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, folder / "vqgan.ckpt", tmp_path / "out")
    found = load_backbone("chameleon", tmp_path / "out").model.lm_head.weight
    assert torch.equal(found, original[0].lm_head.weight)


def test_a_weight_in_two_files_and_files_that_are_not_there_are_named(original, tmp_path):
    folder = copy_of(original[1], tmp_path)
    save_file({"lm_head.weight": torch.zeros(9100, 16)}, folder / "zz_old.safetensors")
    with pytest.raises(
        ValueError, match=r"model-\d+-of-00002\.safetensors and zz_old\.\w+ both hold lm_head"
    ):
        convert(folder, folder / "vqgan.ckpt", tmp_path / "out")
    (folder / "zz_old.safetensors").unlink()
    with_index(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002-of-00002\.safetensors, not there"):
        convert(folder, folder / "vqgan.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>", None]
)
@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "vqgan.ckpt", "config.json", "tokenizer.json"]
)
def test_broken_files_are_named_by_the_command(original, tmp_path, capsys, name, content):
    folder = copy_of(original[1], tmp_path)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    if name == "tokenizer.json":  # read where the configuration does not name the codes
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"vocabulary_map": None}))
    words = ["--trunk", str(folder), "--vqgan", str(folder / "vqgan.ckpt"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert name in said
    assert "again" in said
    assert not (tmp_path / "out").exists()


class Opener:
    """What a hostile pickle holds: reading it would run a command."""

    def __reduce__(self):
        return (open, ("/dev/null",))


def test_pickles_are_not_run(tmp_path):
    torch.save({"state_dict": {"a": Opener()}}, tmp_path / "vqgan.ckpt")
    with pytest.raises(ValueError, match="cannot be read safely"):
        read_pickle(tmp_path / "vqgan.ckpt")


def test_other_models_and_missing_files_are_refused(original, tmp_path):
    folder = copy_of(original[1], tmp_path)
    with pytest.raises(ValueError, match=r"gone\.ckpt is missing"):
        convert(folder, folder / "gone.ckpt", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "emu3"}))
    with pytest.raises(ValueError, match="'emu3', not of a Chameleon"):
        convert(folder, folder / "vqgan.ckpt", tmp_path / "out")


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sjd2_lightning.models.convert",
        "--trunk",
        tmp_path,
        "--vqgan",
        tmp_path,
    ]
    ran = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.strip().splitlines()[-1]) == (
        2,
        f"{tmp_path / 'tokenizer.json'} is missing",
    )
