"""From a prompt to a picture in Python."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sjd2_lightning
from sjd2_lightning.cli.pipeline import Pipeline
from sjd2_lightning.decoding import decode
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import build_shrunken, load_backbone

SMALL = ("model.image_size=[32,32]", "decoding.window=8", "device=cpu")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(None, "weights=model", *SMALL)


def test_the_top_of_the_package_has_it():
    assert sjd2_lightning.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        sjd2_lightning.Pipelin  # noqa: B018


def test_pictures_are_those_of_the_decoder(pipeline):
    """Seeds one behind the other, tokens of `decode`, and the same image by replay and by `ar`."""
    drawn = pipeline(["red heart", "sleepy face"], seed=7)
    method = pipeline.config.methods["sjd2"]
    wanted = decode(pipeline.backbone, ["red heart", "sleepy face"], [7, 8], method, pipeline.layout)
    assert torch.equal(drawn.output.slot_ids, wanted.slot_ids)
    assert drawn.seeds == (7, 8)
    assert [image.size for image in drawn.images] == [(32, 32)] * 2
    assert drawn.passes == wanted.stats.nfe.tolist()
    slots = pipeline.layout.num_slots
    assert drawn.tokens_a_pass == pytest.approx([slots / passes for passes in drawn.passes])
    plain = pipeline("sleepy face", seed=8, method="ar")
    assert plain.passes == [slots]
    assert plain.images[0].tobytes() == drawn.images[1].tobytes()
    assert pipeline("red heart", [3]).seeds == (3,)


def test_a_tuned_folder_and_an_adapter(tmp_path, pipeline):
    """Both by their folder alone, as training leaves them; the copy is read, not the shipped one."""
    folder = Path(shutil.copytree("weights/tiny", tmp_path / "it's mine"))
    shutil.rmtree(folder / "trunk")
    backbone = load_backbone("chameleon", "weights/tiny")
    backbone.add_lora(LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    backbone.save(folder)
    merged, adapted = (
        Pipeline.load(folder, *SMALL),
        Pipeline.load(folder / "adapter", *SMALL),
    )
    assert (merged.weights, adapted.weights) == (str(folder), str(folder / "adapter"))
    tuned = merged("red heart")
    assert torch.equal(tuned.output.slot_ids, adapted("red heart").output.slot_ids)
    assert not torch.equal(tuned.output.slot_ids, pipeline("red heart").output.slot_ids)


def in_the_hubs_cache(folder: Path, name: str, monkeypatch) -> Path:
    """Where a repository's files lie that were downloaded; nothing can be downloaded from now on."""
    cache = folder / f"models--{name.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache / "snapshots" / ("c" * 40)


def test_a_name_on_the_hub_is_all_that_is_needed(tmp_path, monkeypatch):
    """An export of another family by its name: family, size and sampling are its own."""
    place = in_the_hubs_cache(tmp_path, "me/emu", monkeypatch)
    build_shrunken("emu3").save(place)
    settings = {"image_size": [16, 24], "sampling": {"temperature": 0.5, "top_k": 7, "top_p": 1.0}}
    (place / "settings.json").write_text(json.dumps(settings))
    pipeline = Pipeline.load("me/emu", "decoding.window=4", "device=cpu")
    sampling = pipeline.config.methods["sjd2"].sampling
    assert (sampling.temperature, sampling.top_k) == (0.5, 7)
    assert pipeline("cat").images[0].size == (24, 16)
    (place / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match=r"settings\.json names no size and sampling"):
        Pipeline.load("me/emu")


def test_a_release_is_known_by_its_name(tmp_path, monkeypatch):
    """In Hugging Face's own layout, which says nothing of the family: `conf/model` does."""
    place = in_the_hubs_cache(tmp_path, "BAAI/Emu3-Gen-hf", monkeypatch)
    build_shrunken("emu3").save(tmp_path / "saved")
    for part in ("trunk", "text"):
        shutil.copytree(tmp_path / "saved" / part, place, dirs_exist_ok=True)
    keys = ("model.image_size=[16,16]", "model.dtype=float32", "decoding.window=4", "device=cpu")
    pipeline = Pipeline.load("BAAI/Emu3-Gen-hf", *keys)
    assert pipeline.config.methods["sjd2"].sampling.top_k == 2048, "the release's own sampling"
    assert pipeline("cat").images[0].size == (16, 16)
    with pytest.raises(
        ValueError, match=r"get it with `hf download .*sjd2 convert .*then load 'weights/lumina"
    ):
        Pipeline.load("Alpha-VLLM/Lumina-mGPT-7B-768")


def test_shipped_weights_are_named_without_a_place(pipeline):
    assert pipeline.weights == "weights/tiny"


def test_bad_input_is_named(pipeline, tmp_path):
    with pytest.raises(ValueError, match="method 'sjd3': did you mean `sjd`"):
        pipeline("cat", method="sjd3")
    with pytest.raises(ValueError, match="modl: unknown key; did you mean `model`"):
        Pipeline.load(None, "modl=tiny")
    with pytest.raises(ValueError, match=r"neither backbone\.json nor adapter_config\.json"):
        Pipeline.load(tmp_path)
    (tmp_path / "backbone.json").write_text("{}")
    with pytest.raises(ValueError, match=r"names no family \('family'\); export the model again"):
        Pipeline.load(tmp_path)
    with pytest.raises(ValueError, match="source=nobody/nothing: it is neither in the hub's cache"):
        Pipeline.load("nobody/nothing")
