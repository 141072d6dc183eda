"""From a prompt to a picture in Python."""

import shutil
from pathlib import Path

import pytest
import torch

import sjd2_lightning
from sjd2_lightning.cli.pipeline import Pipeline
from sjd2_lightning.decoding import decode
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import load_backbone

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
    assert drawn.tokens_a_pass == pytest.approx([71 / passes for passes in drawn.passes])
    plain = pipeline("sleepy face", seed=8, method="ar")
    assert plain.passes == [71]
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
        Pipeline.load(folder / "adapter", "weights=model", *SMALL),
    )
    assert (merged.weights, adapted.weights) == (str(folder), str(folder / "adapter"))
    tuned = merged("red heart")
    assert torch.equal(tuned.output.slot_ids, adapted("red heart").output.slot_ids)
    assert not torch.equal(tuned.output.slot_ids, pipeline("red heart").output.slot_ids)


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
    with pytest.raises(ValueError, match="no backbone in nobody/nothing"):
        Pipeline.load("nobody/nothing")
