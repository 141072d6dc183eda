"""The benchmark's file: its keys and how its numbers hang together, on one small image a method."""

import importlib.util
import json
import sys
from importlib import import_module

import pytest

from tests.tools.source import REPO


def script(name: str):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", REPO / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    arguments = "--num-prompts 2 --batches 1 2 --modes eager --pixels 32 --methods sjd2 sjd2_paper"
    arguments += " --share-groups 1 --generate-prompts 1 --overrides decoding.window=8"
    decoding = import_module("benchmarks.decoding")
    return json.loads(json.dumps(decoding.measure(decoding.command_line().parse_args(arguments.split()))))


@pytest.mark.slow
def test_methods_are_those_of_the_first_run(found):
    assert list(found["runs"]) == ["eager, batch 1", "eager, batch 2"]
    assert found["methods"] == found["runs"]["eager, batch 1"]
    assert list(found["methods"]) == ["ar", "sjd2", "sjd2_paper"]
    assert set(found["ar_vs_generate"]) == {"speedup", "ours_seconds", "generate_seconds"}


@pytest.mark.slow
def test_what_a_method_came_to(found):
    slots = 4 * (4 + 1) - 1  # rows of codes of 8 x 8 pixels with their ends, but for the last
    for run in found["runs"].values():
        for name, row in run.items():
            assert row["lossless"] is (name != "sjd2_paper")
            assert row["nfe"] * row["step_compression"] == pytest.approx(slots, rel=1e-6)
            assert sum(int(n) * times for n, times in row["acceptance_lengths"].items()) == 2 * slots
            assert sum(row["acceptance_lengths"].values()) == round(2 * row["nfe"])
            assert 0.4 < row["backbone_share"] < 1, "passes over windows are most of a decoding"
            assert row["seconds_per_image"] * row["images_per_second"] == pytest.approx(1)
            assert row["peak_bytes"] > 10_000
            assert row["nll"] > 0
            assert row["window"] == (1 if name == "ar" else 8)
        assert run["ar"]["speedup"] == 1
        assert run["ar"]["nll_minus_ar"] == 0
        assert run["sjd2"]["equal_to_ar"] == 1
        assert run["sjd2"]["nll"] == pytest.approx(run["ar"]["nll"])


@pytest.mark.slow
def test_gain_of_a_batch(found):
    [gains] = found["batch_gain"].values()
    for name, gain in gains.items():
        rates = [run[name]["images_per_second"] for run in found["runs"].values()]
        assert gain == pytest.approx(rates[1] / rates[0])


def test_both_modes_are_run_by_default():
    options = import_module("benchmarks.decoding").command_line().parse_args([])
    assert options.modes == ["eager", "compiled"]
    assert options.batches == [1, 4, 16]


def test_reach_of_a_format():
    """Half a unit of each of two logits, in formats of 8, 11 and 24 bits; guidance weighs both sides."""
    import torch

    near_ties = import_module("benchmarks.near_ties")
    sampling = near_ties.Sampling
    sizes = torch.tensor([1.0, 1.9, 12.0])
    assert near_ties.reach(sizes, torch.bfloat16, sampling()).tolist() == [2**-7, 2**-7, 2**-4]
    assert near_ties.reach(sizes, torch.float16, sampling()).tolist() == [2**-10, 2**-10, 2**-7]
    guided = near_ties.reach(sizes, torch.bfloat16, sampling(guidance_scale=3.0))
    assert guided.tolist() == [5 * 2**-7, 5 * 2**-7, 5 * 2**-4]
