"""Episodes in the shared comparison: records, equality, success, continuing, tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sjd2_lightning.data.sources.pick_place import NUM_ACTIONS, PickAndPlace, actions_of
from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.evaluation.episodes import (
    EpisodeRecord,
    _records,
    act,
    act_methods,
    episode_prompts,
    with_success,
)
from sjd2_lightning.evaluation.policy_methods import PolicyEvaluation, policy_methods
from sjd2_lightning.evaluation.quality import QualityMeter, QualityMetrics
from sjd2_lightning.evaluation.results import measure_methods
from sjd2_lightning.models.policy import ActionPolicy, PolicySizes
from sjd2_lightning.report.table import markdown_table
from sjd2_lightning.report.write import write_report

SIZES = PolicySizes(width=16, num_layers=1, head_width=8)
GREEDY = Sampling(0.0)
DECODINGS = {
    "ar": DecodingConfig("ar", window=1, sampling=GREEDY),
    "jacobi": DecodingConfig("jacobi", window=32, acceptance="match", sampling=GREEDY),
    "cap_2": DecodingConfig("jacobi", window=32, acceptance="match", max_passes=2, sampling=GREEDY),
}
EPISODES = episode_prompts(2, seed=0)
SETTINGS = PolicyEvaluation({"other": "b", "base": "a"}, "base")
METHODS = policy_methods(SETTINGS, DECODINGS)


def policies() -> dict[str, ActionPolicy]:
    found = {}
    for seed, name in enumerate(SETTINGS.weights):
        torch.manual_seed(seed)
        found[name] = ActionPolicy(SIZES).eval()
        for weight in found[name].parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    return found


def run(folder, **kwargs):
    return act_methods(policies(), METHODS, EPISODES, folder, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run(tmp_path_factory.mktemp("episodes"), batch_size=1)


def rows_of(store) -> dict[tuple[str, str], EpisodeRecord]:
    return {(record.method, record.key): record for record in store.load()}


def test_episodes_part_at_the_first_chunk_that_differs():
    """What is drawn behind it answers other observations, equal or not."""
    plain = act(policies()["base"], METHODS["ar"], EPISODES)
    for chunk, percent in ((0, 0), (3, 37), (7, 87)):
        codes = plain.codes.clone()
        codes[chunk, 0] += 1
        first, second = _records("jacobi", 0, EPISODES, plain, codes)
        assert (first.equal, second.equal) == (percent, 100)


def test_methods_are_named_by_policy_and_the_baseline_is_first():
    assert list(METHODS) == ["ar", "jacobi", "cap_2", "other_ar", "other_jacobi", "other_cap_2"]
    assert METHODS["other_cap_2"].policy == "other"
    assert not METHODS["other_cap_2"].lossless


def test_lossless_methods_equal_plain_decoding_of_their_own_weights(store):
    rows = rows_of(store)
    assert len(rows) == 12
    for item in EPISODES:
        for prefix in ("", "other_"):
            plain, jacobi, cap = (rows[prefix + name, item.key] for name in DECODINGS)
            assert plain.codes == jacobi.codes
            assert plain.equal == jacobi.percent_equal(plain) == 100
            assert cap.percent_equal(plain) < 100
            assert plain.chunk_passes == (32,) * 8
            assert cap.chunk_passes == (2,) * 8
            assert jacobi.nfe == sum(jacobi.chunk_passes) < plain.nfe
            assert all(sum(row.accepted) == row.num_generated == 256 for row in (plain, jacobi, cap))
            assert len(jacobi.settled_iteration) == 32
        assert rows["ar", item.key].codes != rows["other_ar", item.key].codes


def test_an_episode_is_what_its_actions_do(store):
    for record in store.load()[:4]:
        world = PickAndPlace()
        world.reset([record.seed])
        actions = actions_of(np.array(record.codes).reshape(NUM_ACTIONS, 1, 4), 64)
        for action in actions:
            world.step(action)
        assert record.success == bool(world.state.solved[0])


def test_an_episode_does_not_depend_on_its_batch_and_a_run_goes_on(store, tmp_path):
    together = rows_of(run(tmp_path, batch_size=2))
    assert all(together[key].codes == record.codes for key, record in rows_of(store).items())
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join(lines[:6]) + "\n")  # the second batch is lost
    assert len(run(store.folder, batch_size=1).load()) == 12
    with pytest.raises(ValueError, match="batch_size"):
        run(store.folder, batch_size=2)


def test_the_shared_report_shows_success(store, tmp_path):
    plain = measure_methods(store, METHODS, EPISODES, QualityMeter(QualityMetrics(), None))
    own = plain.methods["jacobi"]
    own = replace(
        own, records=tuple(replace(row, success=place > 0) for place, row in enumerate(own.records))
    )
    result = with_success(replace(plain, methods={**plain.methods, "jacobi": own}))
    assert result.methods["jacobi"].measured["success"].value == pytest.approx(1 / 2)
    assert result.methods["cap_2"].measured["chunk_passes"].value == 2
    assert "success_minus_ar" not in result.methods["ar"].measured
    assert result.methods["jacobi"].equal_to_ar == 1
    assert result.methods["other_cap_2"].equal_to_ar == 0
    table = markdown_table(result)
    assert "| other_jacobi | match | 100 %" in table
    assert "| cap_2 | match (lossy) | 0 %" in table
    assert "success" in table
    assert "p95 ms / chunk" in table
    files = write_report(result, {}, folder=tmp_path)
    found = json.loads(files.json.read_text())["methods"]["other_cap_2"]
    assert found["config"]["policy"] == "other"
    assert found["config"]["decoding"]["max_passes"] == 2
    assert found["success"] is not None
    assert "other_cap_2" in files.html.read_text()


def test_a_policy_without_plain_decoding_and_folders_without_one_are_refused(tmp_path):
    alone = {"jacobi": METHODS["jacobi"]}
    with pytest.raises(ValueError, match="compare: needs ar, which all methods of base"):
        act_methods(policies(), alone, EPISODES, tmp_path)
    problems = PolicyEvaluation({"a b": str(tmp_path)}, "c").problems()
    assert [line.split(":")[0] for line in problems] == [
        "baseline=c", "weights.a b", f"weights.a b={tmp_path}",
    ]  # fmt: skip
    assert PolicyEvaluation({}, "c").problems() == ["weights={}: give at least the folder of the baseline"]


def test_seconds_of_a_chunk_are_its_share_of_those_of_its_batch(store):
    plain = measure_methods(store, METHODS, EPISODES, QualityMeter(QualityMetrics(), None))
    own = plain.methods["jacobi"]
    rows = tuple(replace(row, batch_size=4, chunk_seconds=(0.2,) * 9 + (0.8,)) for row in own.records)
    found = with_success(replace(plain, methods={"jacobi": replace(own, records=rows)})).methods["jacobi"]
    assert found.seconds_p95 == pytest.approx(0.2), "two of twenty chunks took a quarter of 0.8 s"
    assert found.measured["chunk_ms_p95"].value == pytest.approx(200)
