"""The map of replay decoding against the decoder, its views written out, and bounds against enumeration."""

import json
from importlib import import_module

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation.prompts import PromptItem
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

SAMPLING = Sampling(0.8, guidance_scale=2.0)
ITEMS = [PromptItem(f"p{number}", text, 7 + number) for number, text in enumerate(RAGGED_PROMPTS)]


@pytest.fixture(scope="module")
def replay():
    backbone = tiny_chameleon(6, seed=2, scale=0.8)
    return import_module("benchmarks.study.replay_map").ReplayMap(
        backbone, ITEMS, backbone.layout(8, 8), SAMPLING
    )


@pytest.mark.parametrize("window", [1, 3, 6, 40])
def test_with_drafts_alone_it_is_the_decoder(replay, window):
    config = DecodingConfig("sjd", window=window, sampling=SAMPLING)
    seeds = [item.seed for item in ITEMS]
    ours = decode(replay.backbone, list(RAGGED_PROMPTS), seeds, config, replay.layout)
    assert torch.equal(ours.slot_ids, replay.truth)
    assert (
        replay.passes(import_module("benchmarks.study.replay_map").Shape(window)) == ours.stats.nfe.tolist()
    )


@pytest.mark.parametrize("view", ["left", "row", "above", "row_above"])
def test_views_are_those_of_images_written_out(replay, view):
    drafts, row = replay.first, replay.row
    with torch.inference_mode():
        found = replay.log_laws(view, drafts)
        for slot in replay.layout.code_slots.tolist():
            own = row == row[slot]
            known = {
                "left": torch.arange(len(row)) == slot - 1,
                "row": own,
                "above": row < row[slot],
                "row_above": own | (row == row[slot] - 1),
            }[view]
            image = replay.truth.where(known, drafts)
            expected = replay.log_laws("drafts", image)[:, slot]
            assert torch.allclose(found[:, slot], expected, atol=1e-5), slot


@pytest.mark.parametrize("view", ["drafts", "left", "row", "above", "row_above"])
@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 7), (1, 6), (8, 14), (12, 30)])
def test_laws_of_a_window_are_those_of_the_whole_image(replay, view, first, end):
    drafts = replay.truth.where(torch.arange(19) < first, replay.first)
    with torch.inference_mode():
        whole, part = replay.log_laws(view, drafts), replay.log_laws(view, drafts, None, first, end)
    assert torch.allclose(part[:, first:end], whole[:, first:end], atol=1e-5)
    assert not part[:, :first].any()
    assert not part[:, end:].any()


def test_slots_between_runs_are_not_seen(replay):
    hidden = torch.zeros_like(replay.first, dtype=torch.bool)
    hidden[:, 3:5] = True
    others = (replay.first + 1) % 6
    changed = others.where(hidden & replay.is_code, replay.first)
    with torch.inference_mode():
        one, two = (replay.log_laws("drafts", drafts, hidden) for drafts in (replay.first, changed))
        seen = replay.log_laws("drafts", changed)
    assert torch.allclose(one[:, 6:], two[:, 6:], atol=1e-6)
    assert not torch.allclose(one[:, 6:], seen[:, 6:], atol=1e-3)


def test_a_window_of_parts_draws_as_many_slots_and_ends_at_the_same_image(replay):
    shape = import_module("benchmarks.study.replay_map").Shape(6, parts=2, step=5)
    drawn = shape.drawn(torch.tensor([0, 4]), 19).nonzero()[:, 1].tolist()
    assert drawn == [0, 1, 2, 5, 6, 7, 4, 5, 6, 9, 10, 11]
    whole = import_module("benchmarks.study.replay_map").Shape(6)
    assert (
        import_module("benchmarks.study.replay_map").Shape(6, parts=1).drawn(torch.tensor([4]), 19).sum() == 6
    )
    passes = replay.passes(shape)
    assert all(-(-19 // 3) <= num <= 19 for num in passes)
    assert all(num >= -(-19 // 6) for num in replay.passes(whole))


def test_expected_passes():
    expected_passes = import_module("benchmarks.study.replay_map").expected_passes
    ones, zeros = torch.ones(1, 7), torch.zeros(1, 7)
    assert expected_passes(ones, 3) == [3]
    assert expected_passes(zeros, 3) == [7]
    # three slots, window 2: the first pass commits two slots with probability 0.25, then one pass is left
    assert expected_passes(torch.tensor([[0.25, 0.5, 0.9]]), 2) == [
        1 + 0.25 * 1 + 0.75 * (1 + 0.5 * 0 + 0.5 * 1)
    ]
    rng = torch.Generator().manual_seed(0)
    stands = torch.rand(1, 7, generator=rng)
    total, trials = 0, 4000
    for _ in range(trials):
        head = 0
        while head < 7:
            total, run = total + 1, 0
            while run < min(3, 7 - head) - 1 and torch.rand((), generator=rng) < stands[0, head + run]:
                run += 1
            head += run + 1
    assert expected_passes(stands, 3)[0] == pytest.approx(total / trials, rel=0.02)


def test_statistics_hang_together(replay):
    acceptance = import_module("benchmarks.study.acceptance")
    found = acceptance.statistics([(replay, ITEMS)], 6)
    assert found["passes"] == sum(replay.passes(acceptance.Shape(6)))
    for kind in ("cause", "entropy", "distance", "column", "row"):
        groups = found[f"by_{kind}"].values()
        assert sum(one["compared"] for one in groups) == found["compared"]
        rejected = sum(one["compared"] * one["rejected"] for one in groups)
        assert rejected == pytest.approx(found["compared"] * found["rejected"], rel=1e-2)
    assert sum(one["share_of_rejected"] for one in found["by_cause"].values()) == pytest.approx(1, abs=1e-3)
    coupling = found["coupling"]
    assert coupling["independent"] < coupling["maximal"] <= 1
    assert found["laws"]["sum_of_squares"] <= found["laws"]["largest"]


def test_a_draft_of_the_true_law_stands(replay):
    """Most laws of view `row` are true: those of the head's row."""
    watcher = import_module("benchmarks.study.acceptance_statistics").Statistics(replay)
    seen = []
    shape = import_module("benchmarks.study.replay_map").Shape(8)
    replay.passes(shape, "row", lambda one: (watcher(one), seen.append(one)))
    rejected, maximal = (
        torch.cat([note[name] for note in watcher.noted]) for name in ("rejected", "maximal")
    )
    same = maximal > 1 - 1e-5
    assert same.sum() > 10
    assert not rejected[same].any()
    assert rejected[~same].any()
    for one in seen:
        assert torch.equal(one.compared.sum(1), one.committed.clamp_max(shape.run - 1))


def test_what_is_done_is_not_done_again(replay, tmp_path, monkeypatch):
    acceptance = import_module("benchmarks.study.acceptance")
    tiny_chameleon(6, seed=2, scale=0.8).save(tmp_path / "model")
    arguments = (
        f"--weights {tmp_path}/model --out {tmp_path}/out --num-prompts 2 --batch 2 --pixels 8 --windows 4 6"
    )
    arguments += " --statistics-window 4 --parts 2 --lags 0 1"
    options = acceptance.command_line().parse_args(arguments.split())
    found = acceptance.measure(replay.backbone, options)
    assert list(found["tokens_a_pass"]["parts 2, lag 1"]) == ["4", "6"]
    oracle, random = (found["tokens_a_pass"][name]["6"] for name in ("oracle row_above", "draft_init random"))
    assert oracle["tokens_a_pass"]["value"] > random["tokens_a_pass"]["value"]
    [lost] = (tmp_path / "out").glob("*/*/oracle-above-w4.json")
    lost.unlink()
    done = []

    def watched(shape, view, group):
        done.append((shape.window, view))
        return ours(shape, view, group)

    ours = acceptance.by_map
    monkeypatch.setattr(acceptance, "by_map", watched)
    monkeypatch.setattr(acceptance, "by_decoding", pytest.fail)
    again = acceptance.measure(replay.backbone, options)
    assert done == [(4, "above")]
    assert json.dumps(again) == json.dumps(found)
    acceptance.print_tables(found)
