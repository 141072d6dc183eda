"""The benchmark of training on a GPU, on a CPU with two layers: its figures, and how they hang together."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.training_gpu import PARTS
from tests.tools.source import REPO


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both parts, by the command."""
    path = tmp_path_factory.mktemp("training") / "training.json"
    words = [sys.executable, "benchmarks/training.py", "--gpu", "--smoke", "--json", str(path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, cwd=REPO, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    return {name: entry["found"] for name, entry in json.loads(path.read_text())["parts"].items()}


def test_every_kind_of_layers_has_a_row(found):
    assert list(found) == list(PARTS)
    if importlib.util.find_spec("torchao") is None:
        assert found.pop("fp8") == []
    for rows in found.values():
        kinds = {(row["compiled"], row["checkpointing"]) for row in rows}
        assert kinds == {(compiled, kind) for compiled in (False, True) for kind in ("full", "selective")}


def test_figures_hang_together(found):
    for name, rows in found.items():
        for row in rows:
            tokens = row["batch"] * (row["pixels"] / (8 if name == "long" else 16)) ** 2
            assert row["tokens_per_s"] * row["seconds"] == pytest.approx(tokens)
            assert row["operations"] > 0
            assert row["gib"] > 0
            assert row["mfu"] is None, "the peak of a CPU is not known"
            assert row["planned_gib"] > 7, "of the release"


def test_without_a_gpu_it_says_what_to_do():
    words = [sys.executable, "benchmarks/training.py", "--gpu", "--json", "unused.json"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(words, cwd=REPO, env=variables, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "torch sees no CUDA device; --smoke" in ran.stderr
