"""The comparison: same prompts and seeds, nothing twice, nothing lost, numbers that mean what they say."""

import dataclasses
import json
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.evaluation import jobs
from sjd2_lightning.evaluation.compare import decode_methods
from sjd2_lightning.evaluation.jobs import jobs_of_rank
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.evaluation.quality import QualityMeter
from sjd2_lightning.evaluation.results import measure_methods, speedup
from sjd2_lightning.evaluation.store import RecordStore
from sjd2_lightning.run import stages
from tests.tools.small_evaluation import (
    METHODS,
    PROMPTS,
    SIDE,
    broken_backbone,
    evaluate,
    metrics,
    numbers,
    reference_set,
    small_backbone,
    tokens,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def result(folder):
    return evaluate(folder)


def test_every_method_draws_every_prompt(result, folder):
    assert list(result.methods) == list(METHODS)
    for name, method in result.methods.items():
        assert [record.key for record in method.records] == [item.key for item in PROMPTS]
        assert method.num_images == len(PROMPTS) == len(list((folder / "images" / name).glob("*.png")))
        for record in method.records:
            assert sum(record.accepted) == record.num_generated
            assert len(record.accepted) == record.nfe == max(record.settled_iteration) + 1
            assert record.size == (4, 4)
            assert len(record.image_ids) == len(record.settled_iteration) == 16
        assert method.acceptance_counts[0] == 0
        assert sum(method.acceptance_counts) == sum(record.nfe for record in method.records)


def test_replay_draws_the_images_of_autoregression_in_fewer_passes(result):
    ar = result.methods["ar"]
    for name in ("sjd", "sjd2"):
        method = result.methods[name]
        assert method.equal_to_ar == 1
        assert method.measured["step_compression"].value > 1.2
        for key in ("fd", "kid", "clip_score"):
            assert method.measured[key] == ar.measured[key]
        assert method.measured["clip_score_minus_ar"].value == 0
    assert ar.measured["nfe"].value == ar.records[0].num_generated
    assert ar.measured["step_compression"].value == ar.measured["speedup"].value == 1
    assert result.methods["sjd2_paper"].equal_to_ar < 1
    assert not [text for text in result.warnings if "bug" in text]


def test_numbers_are_those_of_the_records(result):
    for method in result.methods.values():
        passes = [record.nfe for record in method.records]
        low, high = method.measured["nfe"].interval
        assert low <= method.measured["nfe"].value <= high
        assert method.measured["nfe"].value == pytest.approx(np.mean(passes))
        compression = sum(record.num_generated for record in method.records) / sum(passes)
        assert method.measured["step_compression"].value == pytest.approx(compression)


def test_reference_rows_show_the_scale(result):
    quality = {name: row.measured for name, (_, row) in result.references.items()}
    assert list(quality) == ["real", "reconstructed", "blurred", "patch_shuffled"]
    assert {count for count, _ in result.references.values()} == {len(PROMPTS)}
    assert quality["real"]["fd"].value < quality["blurred"]["fd"].value
    assert quality["real"]["fd"].value < result.methods["ar"].measured["fd"].value
    assert any("N = 5 <" in text for text in result.warnings)


def test_clip_score_is_compared_with_other_prompts(result):
    ar = result.methods["ar"].measured
    assert ar["clip_gain"].value == pytest.approx(ar["clip_score"].value - ar["clip_score_shuffled"].value)
    assert np.mean(result.methods["ar"].clip_scores) == pytest.approx(ar["clip_score"].value)


def test_another_batch_size_draws_the_same_images(result, tmp_path):
    alone = evaluate(tmp_path, batch_size=1, methods={name: METHODS[name] for name in ("ar", "sjd2")})
    assert tokens(alone)["ar"] == tokens(result)["ar"]
    assert tokens(alone)["sjd2"] == tokens(result)["sjd2"]


def test_order_of_methods_rotates_and_batches_do_not_depend_on_ranks():
    jobs = jobs_of_rank(PROMPTS, ["ar", "sjd"], batch_size=2)
    assert [(job.batch, job.method) for job in jobs] == [
        (0, "ar"), (0, "sjd"), (1, "sjd"), (1, "ar"), (2, "ar"), (2, "sjd")
    ]  # fmt: skip
    ranks = [jobs_of_rank(PROMPTS, ["ar", "sjd"], 2, rank, 2) for rank in range(2)]
    assert {(job.batch, job.method, job.prompts) for jobs in ranks for job in jobs} == {
        (job.batch, job.method, job.prompts) for job in jobs
    }
    assert {job.method for job in ranks[0][:1] + ranks[0][2:3]} == {"ar", "sjd"}


class Killed(Exception):
    pass


@pytest.mark.parametrize(("moment", "where"), [(0, "image"), (3, "image"), (3, "record"), (5, "record")])
def test_a_killed_run_goes_on_where_it_stopped(result, tmp_path, monkeypatch, moment, where):
    whole, some = RecordStore.append, {name: METHODS[name] for name in ("ar", "sjd2")}
    calls = []

    def killed(store, records, images):
        calls.append(records)
        if len(calls) == moment + 1:
            if where == "record":
                whole(store, records, images)
                with store.path.open("r+b") as file:
                    file.truncate(store.path.stat().st_size - 9)
            raise Killed
        whole(store, records, images)

    monkeypatch.setattr(RecordStore, "append", killed)
    with pytest.raises(Killed):
        evaluate(tmp_path, methods=some)
    decoded_before = len(calls) - 1
    calls.clear()
    monkeypatch.setattr(RecordStore, "append", lambda *args: (calls.append(args), whole(*args)))
    again = evaluate(tmp_path, methods=some)
    assert len(calls) == 3 * len(some) - decoded_before
    assert tokens(again) == {name: tokens(result)[name] for name in some}
    assert numbers(again) == {key: value for key, value in numbers(result).items() if key[0] in some}


def test_a_finished_folder_is_not_decoded_again(result, folder, monkeypatch):
    monkeypatch.setattr(jobs, "decode", None)
    assert numbers(evaluate(folder)) == numbers(result)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 3}, "batch_size"),
        ({"methods": METHODS | {"sjd": DecodingConfig("sjd", window=7)}}, r"methods\.sjd\.window"),
        ({"prompts": PROMPTS[:4]}, "prompts"),
        ({"backbone": small_backbone(seed=1)}, "weights"),
    ],
    ids=["batch size", "method", "prompts", "weights"],
)
def test_a_folder_of_another_configuration_is_refused(result, folder, change, name):
    before = (folder / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"another configuration \({name} differ"):
        evaluate(folder, **change)
    assert (folder / "records.jsonl").read_bytes() == before


def test_replace_decodes_anew(tmp_path):
    few = {"methods": {"sjd": METHODS["sjd"]}, "prompts": PROMPTS[:2]}
    evaluate(tmp_path, **few)
    anew = evaluate(tmp_path, backbone=small_backbone(seed=1), replace=True, **few)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
    assert anew.methods["sjd"].equal_to_ar is None
    assert "speedup" not in anew.methods["sjd"].measured
    assert any("no baseline" in text for text in anew.warnings)


def test_modes_and_random_state_are_left_alone(tmp_path):
    backbone = small_backbone().train()
    backbone.image_tokenizer.eval()
    before = [part.training for part in backbone.modules()]
    state = torch.get_rng_state()
    evaluate(tmp_path, backbone, PROMPTS[:1], methods={"sjd2": METHODS["sjd2"]}, warm_up=True)
    assert [part.training for part in backbone.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_up_is_not_recorded(tmp_path, monkeypatch):
    decoded = []
    real = jobs.decode
    monkeypatch.setattr(jobs, "decode", lambda *args: (decoded.append(args[3]), real(*args))[1])
    evaluate(tmp_path, prompts=PROMPTS[:2], warm_up=True)
    assert len(decoded) == 2 * len(METHODS)
    assert decoded[: len(METHODS)] == list(METHODS.values())
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2 * len(METHODS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {}}, "there are no methods"),
        (
            {"methods": {"ar": METHODS["ar"], "x": DecodingConfig("sjd", window=0)}},
            "'x'.*window=0: must be at least 1",
        ),
        ({"methods": {"a/b": METHODS["sjd"]}}, "cannot name a folder"),
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": [PromptItem("a", " ", 0)]}, "'a' is empty"),
        ({"prompts": [PROMPTS[0], PROMPTS[0]]}, "'p0' occurs 2 times"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"layout": small_backbone().layout(16, 16)}, "cannot be compared"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_one_error_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_prompt_the_model_refuses_is_named(tmp_path):
    prompts = [*PROMPTS[:2], PromptItem("long", "cat " * 240, 1)]  # 5 tokens of the template, 19 of the image
    named = r"prompt 3 of 3, 'long', .*: the prompt 'cat .*' has 245 tokens .* 256 positions, 19 of them"
    with pytest.raises(ValueError, match=named):
        evaluate(tmp_path / "out", prompts=prompts)
    assert not (tmp_path / "out").exists()


def broken_store(result, folder):
    """A copy of the result's records in which the second image of sjd has another code at place 6."""
    store = RecordStore(folder, result.store.identity)
    for method in result.methods.values():
        rows = list(method.records)
        if method.name == "sjd":
            ids = list(rows[1].image_ids)
            ids[6] = (ids[6] + 1) % 16
            rows[1] = dataclasses.replace(rows[1], image_ids=tuple(ids))
        store.append(rows, result.store.images(method.records))
    return store


@pytest.mark.parametrize("tie_slot", [None, 6, 7])
def test_a_replay_that_differs_is_a_bug_unless_a_near_tie_explains_it(
    result, tmp_path, monkeypatch, tie_slot
):
    broken_store(result, tmp_path)

    class FakeTies:
        # Code 6 is slot 7: a row end comes before it.
        def __init__(self):
            self.slots = []

        def __call__(self, iteration):
            self.slots.append((1, tie_slot))

    monkeypatch.setattr(jobs, "NearTies", FakeTies)
    again = evaluate(tmp_path)
    assert again.methods["sjd"].equal_to_ar == 0.8
    assert again.methods["sjd"].near_ties == (tie_slot == 7)
    bugs = [text for text in again.warnings if "bug" in text]
    assert len(bugs) == (tie_slot != 7)
    assert all("sjd: image p1" in text for text in bugs)


def test_other_sampling_than_the_baselines_is_no_replay_of_it(result, tmp_path):
    methods = {
        "ar": METHODS["ar"],
        "sjd": dataclasses.replace(METHODS["sjd"], sampling=Sampling(temperature=0.3)),
    }
    assert not [text for text in evaluate(tmp_path, methods=methods).warnings if "bug" in text]


def test_speedup_is_the_median_of_paired_batches(result):
    ar, sjd = result.methods["ar"].records, result.methods["sjd"].records

    def timed(records, seconds, process="a"):
        return [dataclasses.replace(r, seconds=seconds[r.batch], process=process) for r in records]

    base, fast = timed(ar, [4.0, 9.0, 10.0]), timed(sjd, [2.0, 3.0, 1.0])
    found = speedup(base, fast)
    assert found.value == 3  # of 2, 3 and 10
    assert found.interval == (2, 10)
    assert "3 prompt batches" in found.protocol
    resumed = [dataclasses.replace(r, process="b") if r.batch == 2 else r for r in fast]
    assert speedup(base, resumed).value == 2.5
    apart = speedup(base, timed(sjd, [2.0, 3.0, 1.0], "b"))
    assert apart.value == 3
    assert apart.flags


def test_missing_images_are_named(result, tmp_path):
    store = RecordStore(tmp_path, {})
    with pytest.raises(
        ValueError, match=r"20 images are missing, the first by method and key \('ar', 'p0'\)"
    ):
        measure_methods(store, METHODS, PROMPTS, QualityMeter(metrics(), None))


def full(*_):
    raise OSError(28, "No space left on device")


def on_rank(rank, port, folders):
    """One of two processes; rank 1 has a folder of its own, as on a machine without a shared disk."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    backbone = small_backbone()
    layout = backbone.layout(SIDE, SIDE)
    for folder in (folders["shared"], folders["apart"] / str(rank)):
        decoded = decode_methods(
            backbone, METHODS, PROMPTS, layout, folder, batch_size=2, warm_up=False, progress=False
        )
        assert (decoded is None) == (rank == 1)
    if rank == 1:
        RecordStore.append = full
    with pytest.raises(OSError, match="No space left"):  # none waits for the other for ever
        decode_methods(backbone, METHODS, PROMPTS, layout, folders["full"], warm_up=False, progress=False)
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_draw_the_same_images(result, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"shared": tmp_path / "shared", "apart": tmp_path / "apart", "full": tmp_path / "full"}
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=on_rank, args=(rank, port, folders)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    lines = [len(path.read_text().splitlines()) for path in sorted(folders["shared"].glob("*.jsonl"))]
    assert sum(lines) == len(METHODS) * len(PROMPTS)
    assert min(lines) > 0
    for folder in (folders["shared"], folders["apart"] / "0"):
        assert tokens(evaluate(folder)) == tokens(result)
        assert numbers(evaluate(folder)) == numbers(result)


def test_references_of_other_prompts_are_taken_evenly():
    reference = reference_set()
    strangers = [PromptItem(f"q{number}", "red", 0) for number in range(3)]
    assert reference.matching(strangers).keys == ("p0", "p6", "p11")
    assert reference.matching(PROMPTS[1:3]).keys == ("p1", "p2")


def test_costs_are_those_of_the_records(result):
    for method in result.methods.values():
        batches = {record.batch: record for record in method.records}.values()
        seconds = sum(record.seconds for record in batches)
        assert method.measured["images_per_second"].value == pytest.approx(len(PROMPTS) / seconds)
        an_image = [record.seconds / record.batch_size for record in method.records]
        assert method.measured["seconds_per_image"].value == pytest.approx(np.median(an_image))
        assert method.seconds_p95 == pytest.approx(np.quantile(an_image, 0.95))
        low, high = method.measured["seconds_per_image"].interval
        assert low <= method.measured["seconds_per_image"].value <= high <= method.seconds_p95 * 1.01 + high
        assert "peak_memory_gib" not in method.measured  # a CPU cannot tell
    per_token = {name: m.measured["flops_per_token"].value for name, m in result.methods.items()}
    assert per_token["ar"] < per_token["sjd"] < 6 * per_token["ar"]  # windows of 6, some of them kept


def test_peak_memory_is_the_highest_of_all_batches(result, tmp_path):
    store = RecordStore(tmp_path, {})
    records = list(result.methods["ar"].records)
    store.append(
        [dataclasses.replace(r, peak_bytes=(r.batch + 1) * 2**30) for r in records],
        result.store.images(records),
    )
    found = measure_methods(store, {"ar": METHODS["ar"]}, PROMPTS, QualityMeter(metrics(), None))
    assert found.methods["ar"].measured["peak_memory_gib"].value == 3


def test_unusable_input_is_found_before_the_folder_is_claimed(tmp_path):
    started = []
    with pytest.raises(ValueError, match="is empty"):
        evaluate(tmp_path / "a", prompts=[PromptItem("a", "", 0)], on_start=lambda: started.append(1))
    assert started == []
    few = {"prompts": PROMPTS[:2], "methods": {"sjd": METHODS["sjd"]}}
    evaluate(tmp_path / "b", on_start=lambda: started.append(1), **few)
    with pytest.raises(ValueError, match="another configuration"):
        evaluate(tmp_path / "b", backbone=small_backbone(1), on_start=lambda: started.append(2), **few)
    assert started == [1]


def test_progress_bar_counts_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "is_watched", lambda: True)
    evaluate(tmp_path, prompts=PROMPTS[:2], methods={"sjd": METHODS["sjd"]}, progress=True)
    assert "2/2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["methods"].keys() == {"sjd"}


def test_nothing_is_reported_of_a_model_whose_numbers_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match=r"not finite at slot 0.*the weight \S*up_proj"):
        evaluate(tmp_path, broken_backbone())
    assert not list(tmp_path.rglob("*.png"))
