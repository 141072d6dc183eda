"""Folders of weights: what is broken is named with its file and a remedy, what is not named is not read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sjd2_lightning.models.image_tokenizer import load_image_tokenizer
from sjd2_lightning.models.registry import load_backbone
from tests.tools.tiny_backbones import tiny_chameleon

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>404</title></head></html>"
JSON_FILES = (
    "backbone.json",
    "trunk/config.json",
    "trunk/generation_config.json",
    "text/tokenizer.json",
    "text/tokenizer_config.json",
    "tokenizer/config.json",
    "tokenizer/image_tokenizer.json",
)
WEIGHTS = ("trunk/model.safetensors", "tokenizer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_chameleon(5).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def in_shards(folder) -> dict[str, str]:
    """Cuts the trunk's weights into two files with an index; returns its map."""
    trunk = folder / "trunk"
    state = load_file(trunk / "model.safetensors")
    (trunk / "model.safetensors").unlink()
    weight_map = {}
    for number in (0, 1):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        part = {key: state[key] for key in sorted(state)[number::2]}
        save_file(part, trunk / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (trunk / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def head(folder) -> torch.Tensor:
    return load_backbone("chameleon", folder).model.lm_head.weight


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "it is empty"), (POINTER, "pointer that git-lfs leaves"), (PAGE, "it is a web page")],
    ids=["empty", "pointer", "page"],
)
@pytest.mark.parametrize("name", [*WEIGHTS, *JSON_FILES])
def test_what_stands_in_for_a_file_is_named(folder, name, content, named):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} .*{named}.*download it again \(`git lfs pull`"):
        load_backbone("chameleon", folder)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_file_that_was_cut_is_named(folder, name, kept):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is no whole safetensors file: .*download it again"):
        load_backbone("chameleon", folder)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, "byte-order mark: save it as UTF-8 without one"),
        (lambda text: text.decode().encode("utf-16"), "byte-order mark"),
        (lambda text: text[:-5], "line"),
        (lambda text: b"[1]", "a list where an object belongs"),
        (lambda text: b'{"a": "\xe9"}', "utf-8"),
        (lambda text: b"[" * 100_000, "recursion"),
    ],
    ids=["mark", "utf-16", "cut", "list", "latin", "deep"],
)
def test_json_that_cannot_be_read_is_named(folder, name, change, named):
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} cannot be read: .*{named}"):
        load_backbone("chameleon", folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"banana": 1}, "the field banana=1 is not known; known are unconditional, bos"),
        ({"bos": "one"}, "the field bos='one' is no int"),
        ({"template": 3}, "the field template=3 is no str"),
        ({"closing": 3}, "the field closing=3 is no tuple"),
        ({"bos": None}, "the field bos=None is no int"),
    ],
)
def test_fields_that_are_not_known_are_named(folder, fields, named):
    path = folder / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=f"^{path}: {named}"):
        load_backbone("chameleon", folder)


@pytest.mark.parametrize("template", ["draw", "{prompt} {style}", "{prompt", "{prompt} {}"])
def test_a_template_without_a_place_for_the_prompt_is_refused(folder, template):
    path = folder / "backbone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"template": template}))
    with pytest.raises(ValueError, match=r"template='.*' must hold \{prompt\}"):
        load_backbone("chameleon", folder)


def test_a_configuration_that_fits_no_model_is_named(folder):
    path = folder / "trunk" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"trunk do not fit their config\.json"):
        load_backbone("chameleon", folder)
    path = folder / "text" / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"trunk do not fit|tokenizer\.json is no text tokenizer"):
        load_backbone("chameleon", folder)


def test_only_files_that_the_index_names_are_read(folder):
    wanted = head(folder)
    in_shards(folder)
    other = {"lm_head.weight": torch.zeros_like(wanted)}
    for name in ("zz_old.safetensors", "adapter_model.safetensors", "consolidated.safetensors"):
        save_file(other, folder / "trunk" / name, {"format": "pt"})
    (folder / "trunk" / "training_args.bin").write_bytes(PAGE)
    assert torch.equal(head(folder), wanted)


def test_a_single_file_beside_an_index_that_does_not_name_it_is_refused(folder):
    single = folder / "trunk" / "model.safetensors"
    content = single.read_bytes()
    in_shards(folder)
    single.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"has model\.safetensors, and model\.safetensors\.index\.json does not"
    ):
        load_backbone("chameleon", folder)


def test_a_weight_that_two_files_hold_is_refused(folder):
    weight_map = in_shards(folder)
    first, second = (folder / "trunk" / name for name in sorted(set(weight_map.values())))
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    name = min(load_file(first))
    with pytest.raises(ValueError, match=rf"{first.name} and {second.name} both hold {name}"):
        load_backbone("chameleon", folder)


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({}, "has no `weight_map`"),
        ({"weight_map": {"a": 3}}, "has no `weight_map`"),
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "names ../model.safetensors, which is no file of its",
        ),
        ({"weight_map": {"a": "gone.safetensors"}}, r"gone\.safetensors missing"),
    ],
)
def test_an_index_that_names_no_files_is_refused(folder, index, named):
    (folder / "trunk" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=named):
        load_backbone("chameleon", folder)


def test_an_adapter_beside_the_weights_is_not_put_in_unasked(folder):
    (folder / "trunk" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json beside a model's weights.*model\.adapter"):
        load_backbone("chameleon", folder)


def test_an_image_tokenizer_whose_weights_are_not_finite_is_refused(folder):
    path = folder / WEIGHTS[1]
    state = load_file(path)
    state["quantize.embedding.weight"][1, 0] = torch.inf
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weight quantize\.embedding\.weight holds NaN or infinity"):
        load_image_tokenizer(folder / "tokenizer")
