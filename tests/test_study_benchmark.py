"""The study's two scripts: what they read, count and keep, on small random weights."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.stats import DecodeStats
from sjd2_lightning.prompts import PromptItem
from tests.test_decoding_benchmark import script
from tests.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

PROMPTS = [PromptItem(text, text, seed) for seed, text in enumerate(RAGGED_PROMPTS)]
GUIDED = Sampling(guidance_scale=2.0, temperature=0.8)


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(num_codes=12, hidden_size=16, seed=5, scale=0.5).eval()


@pytest.fixture(scope="module")
def study():
    return script("study")


@pytest.fixture(scope="module")
def acceptance():
    return script("acceptance")


def run_folder(place: Path, name: str, loss: float) -> Path:
    folder = place / name
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "backbone.json").write_text("{}")
    (folder / "csv" / "version_0").mkdir(parents=True)
    text = f"step,train/loss,val/loss_clean\n0,,1.9\n9,1.5,\n10,,{loss}\n"
    (folder / "csv" / "version_0" / "metrics.csv").write_text(text)
    noise = {"enabled": True, "schedule": "karras", "t_min": 0.1, "rho": 7.0, "tied": False, "path": "flow"}
    (folder / "train.yaml").write_text(json.dumps({"noise": noise}))
    return folder


@pytest.fixture
def command(study, backbone, tmp_path, monkeypatch):
    """Calls the script on two runs of the same weights; returns what it wrote."""
    monkeypatch.setattr(study, "load_backbone", lambda family, weights: backbone)
    monkeypatch.setattr(study, "held_out_prompts", lambda num: PROMPTS[:num])
    folders = [run_folder(tmp_path, name, loss) for name, loss in (("plain-0", 1.25), ("noisy-0", 1.5))]

    def call(*arguments: str):
        given = [*map(str, folders), "--json", str(tmp_path / "out.json"), "--num-prompts", "4"]
        given += ["--markdown", str(tmp_path / "out.md"), "--figure", str(tmp_path / "out.png")]
        given += ["--windows", "4", "8", "--levels", "1", "--pixels", "8", "8", "--batch-size", "3"]
        study.main([*given, *arguments])
        return json.loads((tmp_path / "out.json").read_text())

    return call


def test_counts_are_those_of_the_decoder(command, backbone, study, tmp_path):
    found = command()
    run = found["runs"]["noisy-0"]
    assert (run["clean_loss"], found["reference"]) == (1.5, "plain-0")
    config = DecodingConfig("sjd2", 8, 1, schedule="karras", t_min=0.1, sampling=Sampling(guidance_scale=3.0))
    layout = backbone.layout(8, 8)
    output = decode(backbone, RAGGED_PROMPTS, range(4), config, layout)
    cell = run["settings"]["sjd2 w8 l1"]
    assert cell["equal_to_ar"] == "4 of 4"
    wanted = 4 * layout.num_slots / int(output.stats.nfe.sum())
    assert cell["tokens_a_pass"]["value"] == pytest.approx(wanted, abs=6e-4)
    assert sum(int(length) * times for length, times in cell["runs"].items()) == 4 * layout.num_slots
    rival = run["settings"][run["best_rival"]]["tokens_a_pass"]["value"]
    ours = run["settings"][run["best_sjd2"]]["tokens_a_pass"]["value"]
    assert run["over_rival"]["value"] == pytest.approx(ours / rival, abs=2e-3)
    assert all(
        row["tokens_a_pass"]["value"] <= rival
        for name, row in run["settings"].items()
        if name.split()[0] in study.RIVALS
    )
    table = (tmp_path / "out.md").read_text()
    assert "| noisy-0 | 1.500 |" in table
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_a_second_start_decodes_nothing_again(command, study, monkeypatch):
    first = command()

    def never(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr(study, "decode", never)
    assert command() == first
    with pytest.raises(AssertionError, match="decoded again"):
        command("--levels", "2")


def test_a_folder_without_weights_is_refused(study, tmp_path):
    with pytest.raises(ValueError, match="holds no exported weights"):
        study.read_run(tmp_path)


@pytest.mark.parametrize("num_levels", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_simulated_windows_take_the_passes_of_the_decoder(acceptance, backbone, num_levels, window):
    layout = backbone.layout(8, 8)
    config = DecodingConfig("sjd2", window, num_levels, sampling=GUIDED)
    output = decode(backbone, RAGGED_PROMPTS, range(4), config, layout)
    for item, nfe in zip(PROMPTS, output.stats.nfe.tolist(), strict=True):
        simulator = acceptance.Simulator(backbone, item.prompt, item.seed, config, layout)
        assert simulator.passes(acceptance.contiguous(window)) == nfe
        assert simulator.tokens.tolist() == output.slot_ids[PROMPTS.index(item)].tolist()


def test_windows_of_two_rows_end_with_the_same_image(acceptance, backbone):
    layout = backbone.layout(8, 8)
    active = acceptance.two_rows(6, layout)
    assert active(0) == [0, 1, 2, 4, 5, 6]
    assert active(2) == [2, 3, 4, 5, 6, 7]
    assert active(5) == [5, 6, 7, 9, 10, 11]
    config = DecodingConfig("sjd2", 1, 1, sampling=GUIDED)
    ar = decode(backbone, RAGGED_PROMPTS, range(4), DecodingConfig("ar", 1, sampling=GUIDED), layout)
    for row, item in enumerate(PROMPTS):
        simulator = acceptance.Simulator(backbone, item.prompt, item.seed, config, layout)
        assert simulator.passes(active) < layout.num_slots
        assert simulator.tokens.tolist() == ar.slot_ids[row].tolist()


def test_facts_of_drafts(acceptance, backbone):
    """Counted by hand from what an observer sees: right draws, and what an independent draft could do."""
    layout = backbone.layout(8, 8)
    truth = acceptance.Truth(4, layout, 12)
    ar = decode(backbone, RAGGED_PROMPTS, range(4), DecodingConfig("ar", 1, sampling=GUIDED), layout, truth)
    drafts, seen = acceptance.Drafts(ar.slot_ids, truth, layout), []

    def both(iteration):
        drafts(iteration)
        for place, row in enumerate(iteration.rows.tolist()):
            head = int(iteration.heads[place])
            for offset, token in enumerate(iteration.tokens[place].tolist()):
                slot = head + offset
                if offset > 0 and slot < layout.num_slots and layout.forced[slot] < 0:
                    seen.append(token == int(ar.slot_ids[row, slot]))

    config = DecodingConfig("sjd2", 7, 1, sampling=GUIDED)
    decode(backbone, RAGGED_PROMPTS, range(4), config, layout, both)
    facts = drafts.table()
    assert facts["drawn_right"].sum() == sum(seen)
    assert len(facts["drawn_right"]) == len(seen)
    first = facts["distance"] == 1  # the head's own token decides: right if it was fed as what it became
    assert facts["left_right"][first].mean() < 1
    assert (facts["overlap"] <= 1 + 1e-5).all()
    right = acceptance.limits(facts)
    assert right["right"] == pytest.approx(sum(seen) / len(seen), abs=1e-3)
    assert sum(row["share of drafts"] for row in right["neighbours fed right"].values()) == pytest.approx(
        1, abs=5e-3
    )
    law = truth.log_probs[:, layout.code_slots].exp()
    assert torch.allclose(law.sum(-1), torch.ones(()), atol=1e-5)
    found = acceptance.independent(truth, layout)
    assert found["sum p^2"] == pytest.approx(float(law.square().sum(-1).mean()), abs=1e-3)
    assert found["tokens a pass"] > 1


def test_a_draft_that_is_certain_is_always_drawn_again(acceptance, backbone):
    layout = backbone.layout(8, 8)
    truth = acceptance.Truth(1, layout, 12)
    truth.log_probs = torch.full_like(truth.log_probs, -torch.inf)
    truth.log_probs[..., 0] = 0
    assert acceptance.independent(truth, layout) == {"sum p^2": 1.0, "tokens a pass": layout.num_slots}


def test_counts_add_up(study):
    cells = {"a w4": {"nfe": [2, 2]}, "a w8": {"nfe": [1, 2]}, "b w4": {"nfe": [1, 1]}}
    assert study.best_of(cells, ["a"]) == "a w8"
    assert study.tokens_a_pass([4, 4], [2, 2]) == {"value": 2.0, "interval": [2.0, 2.0]}
    stats = DecodeStats(torch.tensor([[2], [1]]))
    assert stats.accepted == [[2, 1]]
    options = argparse.Namespace(
        windows=[4], rivals=["mc_sjd"], levels=[1], level_rules=["age", "stable"], estimates=["drawn"]
    )
    names = study.settings(options, {"tied": True}, GUIDED)
    assert list(names) == ["ar", "mc_sjd w4", "sjd2 w4 l1", "sjd2 w4 l1 stable"]
    assert names["sjd2 w4 l1 stable"] == replace(
        DecodingConfig("sjd2", 4, 1, tied=True, sampling=GUIDED), level_rule="stable"
    )
