"""What corrects drafts as a part of a model: folders and adapters hold it, states make room for it."""

import pytest
import torch

from sjd2_lightning.decoding.config import OWN, Correction, DecodingConfig
from sjd2_lightning.evaluation.compare import as_drawn, run_identity
from sjd2_lightning.models.draft_corrector import CORRECTOR_FILE, DraftCorrector
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import load_backbone
from tests.tools.tiny_backbones import tiny_chameleon


def with_head(width: int = 4):
    found = tiny_chameleon(7, seed=4, scale=0.3)
    torch.manual_seed(3)
    found.corrector = DraftCorrector(found.hidden_size, width)
    torch.nn.init.normal_(found.corrector.out.weight)
    return found


def test_a_folder_holds_it(tmp_path):
    backbone = with_head()
    backbone.save(tmp_path)
    again = load_backbone("chameleon", tmp_path).corrector
    for name, value in backbone.corrector.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.half().float())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    backbone.corrector = None
    backbone.save(tmp_path)
    assert load_backbone("chameleon", tmp_path).corrector is None, "one of other weights"


def test_a_folder_with_that_of_another_model_is_refused(tmp_path):
    with_head().save(tmp_path)
    DraftCorrector(5, 4).save(tmp_path / CORRECTOR_FILE)
    with pytest.raises(ValueError, match="is of a model of width 5"):
        load_backbone("chameleon", tmp_path)


def test_an_adapter_brings_it_along(tmp_path):
    backbone = with_head()
    backbone.add_lora(LoraSettings(rank=2))
    backbone.save(tmp_path)
    base = tiny_chameleon(7, seed=4, scale=0.3)
    base.add_lora(LoraSettings(), tmp_path / "adapter")
    assert torch.equal(base.corrector.left.weight, backbone.corrector.left.weight.half().float())


def test_a_state_says_whether_there_is_one():
    plain, other = tiny_chameleon(7, seed=4, scale=0.3), with_head(width=6)
    plain.take_corrector(other.state_dict())
    plain.load_state_dict(other.state_dict())
    assert plain.corrector.width == 6
    other.take_corrector(tiny_chameleon(7, seed=4, scale=0.3).state_dict())
    assert other.corrector is None
    assert not any("corrector" in name for name in other.state_dict())


def test_records_say_what_drew_them(tmp_path):
    """Of a model that has none the own one is no part of a method: folders of before go on."""
    path = tmp_path / "other.safetensors"
    with_head().corrector.save(path)
    methods = {
        "own": DecodingConfig("sjd2", 4, 1, corrector=Correction(OWN)),
        "file": DecodingConfig("sjd2", 4, 1, corrector=Correction(str(path))),
        "exact": DecodingConfig("sjd2", 4, 1, "exact", corrector=Correction(OWN)),
    }
    plain, corrected = tiny_chameleon(7, seed=4, scale=0.3), with_head()
    weights = {
        name: {key: method.corrector.weights for key, method in as_drawn(backbone, methods).items()}
        for name, backbone in {"plain": plain, "corrected": corrected}.items()
    }
    assert weights["plain"] == {"own": None, "file": str(path), "exact": None}
    assert weights["corrected"] == {"own": OWN, "file": str(path), "exact": None}
    identities = [
        run_identity(backbone, methods, [], backbone.layout(6, 6), 1) for backbone in (plain, corrected)
    ]
    assert "corrector" not in identities[0]["methods"]["own"]
    assert identities[1]["methods"]["own"]["corrector"]["weights"] == OWN
    assert identities[0]["weights"] != identities[1]["weights"]
