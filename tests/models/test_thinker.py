"""The language model behind latents: made, read from a folder, adapted, saved; what is refused."""

import json
from dataclasses import replace

import pytest
import torch

from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.thinker import ThinkerSizes, ThoughtSettings, build_thinker, load_thinker
from sjd2_lightning.models.thinking import think
from tests.models.test_thinking import QUESTIONS, SETTINGS, SIZES, thinker

TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc"), "llama": LoraSettings().targets}


def hidden(model):
    with torch.no_grad():
        return think(model, QUESTIONS, 6, 3).hidden


@pytest.mark.parametrize(("family", "projection"), [("gpt2", "mlp"), ("llama", "none")])
def test_what_is_saved_is_read_back_with_its_adapter_merged(family, projection, tmp_path):
    model = thinker(family, projection)
    before = hidden(model)
    model.add_lora(LoraSettings(rank=2, targets=TARGETS[family]))
    assert torch.equal(hidden(model.eval()), before), "a new adapter changes nothing"
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    own = {name for name in trained if "lora_" not in name}
    assert "marks" in own
    assert all(not name.startswith("model.") for name in own), "beside the adapter marks and projection alone"
    assert len(trained - own) == 2 * 2 * (4 if family == "gpt2" else 7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    assert not torch.allclose(hidden(model), before, atol=1e-3)
    model.save(tmp_path)
    found = load_thinker(tmp_path)
    torch.testing.assert_close(hidden(found), hidden(model), rtol=1e-4, atol=1e-4)
    assert found.settings == model.settings
    # the same folder is a language model to begin with
    again = build_thinker(ThinkerSizes(str(tmp_path)), replace(SETTINGS, num_latents=3))
    assert torch.equal(again.embed(torch.tensor([[5]])), found.embed(torch.tensor([[5]])))


def test_a_target_that_is_no_linear_map_is_refused():
    with pytest.raises(ValueError, match="no linear layer q_proj"):
        thinker().add_lora(LoraSettings(targets=("q_proj",)))


def test_wrong_values_and_folders_are_named(tmp_path):
    assert replace(SIZES, width=30).problems() == ["width=30: must be a multiple of 2 num_heads=4"]
    (line,) = ThinkerSizes(str(tmp_path)).problems()
    assert line.startswith(f"path={tmp_path}: there is no config.json")
    assert ThoughtSettings(0, 2).problems()[0].startswith("num_latents=0: num_passes=2 has nothing")
    assert ThoughtSettings(answer_prompt=" ").problems()
    with pytest.raises(ValueError, match=r"pccot\.model\.width=30"):
        build_thinker(replace(SIZES, width=30), SETTINGS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pccot\.model\.path=.*no causal language model"):
        build_thinker(ThinkerSizes(str(tmp_path)), SETTINGS)
    with pytest.raises(ValueError, match="train one with experiment=pccot"):
        load_thinker(tmp_path)
    thinker().save(tmp_path)
    fields = json.loads((tmp_path / "thinker.json").read_text())
    (tmp_path / "thinker.json").write_text(json.dumps({**fields, "projection": "mlp"}))
    with pytest.raises(ValueError, match="does not fit"):
        load_thinker(tmp_path)
