"""The benchmark of the engine on a GPU, on a CPU with two layers: its figures, and how they hang together."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, gpu_cells, gpu_parts
from sjd2_lightning.models.small import SIZES
from tests.tools.source import REPO


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All parts, by the command: the compiler cannot read functions whose types tests check."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    words = [sys.executable, "benchmarks/gpu.py", "--smoke", "--json", str(path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, cwd=REPO, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    for part in gpu_parts.PARTS:
        assert f"{part} ...\n{part}: " in ran.stdout, "a line when it starts, and one with its seconds"
    return path, json.loads(path.read_text())["parts"]


@pytest.fixture(scope="module")
def found(measured):
    return {name: entry["found"] for name, entry in measured[1].items()}


def test_every_part_says_where_and_how_long(measured):
    assert list(measured[1]) == list(gpu_parts.PARTS)
    for entry in measured[1].values():
        assert entry["seconds"] > 0
        assert entry["machine"]["torch"] == torch.__version__
        assert entry["machine"]["smoke"]


def test_passes_against_ar_and_the_bus(found):
    assert found["passes"].keys() == {"lumina", "emu3", "janus"}
    bandwidth = found["card"]["bytes_per_second"]
    for name, rows in found["passes"].items():
        timed = {(r["engine"], r["guided"], r["rows"], r["window"]): r for r in rows if "ms" in r}
        assert {row["engine"] for row in rows if "error" in row} == {"graphs"}, "what a CPU cannot run"
        for (engine, guided, num, _), row in timed.items():
            assert row["share_of_the_bus"] == pytest.approx(row["least_ms"] / row["ms"])
            assert row["outside_trunk_and_head_share"] == pytest.approx(
                row["outside_trunk_and_head_ms"] / row["ms"]
            )
            if engine == "eager":
                assert row["cost_over_ar"] == pytest.approx(row["ms"] / timed[engine, guided, num, 1]["ms"])
        if name == "lumina":
            assert {(e, g, n) for e, g, n, _ in timed} >= {
                *((e, True, 1) for e in ("eager", "compiled")),
                ("eager", False, 1),
                ("eager", True, 2),
            }
            one, two = (timed["eager", True, num, 1]["least_ms"] * bandwidth / 1000 for num in (1, 2))
            columns, token = 19 // 2, 2 * 2 * 16 * 2  # keys and values of two layers, 16 wide, in bfloat16
            assert two - one == pytest.approx(2 * columns * token), "a row more, and its empty twin"


def test_counts_of_equal_images(found):
    assert found["equality"].keys() == {"miniature", "lumina"}
    for counts in found["equality"].values():
        assert counts.keys() == {"as_fast_as_it_goes", "same_shape", "invariant"}
        for count in counts.values():
            assert count["images"] == 2
            assert "error" in count or 0 <= count["equal"] <= 2


def test_ratios_follow_from_what_they_are_of(found):
    many = found["throughput"]
    assert many["gain"] == pytest.approx(many["tokens_per_second_many"] / many["tokens_per_second_one"])
    rounded = found["quantize"]
    if importlib.util.find_spec("torchao") is None:
        assert "torchao is not installed" in rounded["int8"]["error"]
    else:
        before, after = (rounded[kind]["ar_tokens_per_second"] for kind in ("bfloat16", "int8"))
        assert rounded["gain"] == pytest.approx(after / before)
    held = found["memory"]
    assert held["peak_over_plan"] == pytest.approx(held["peak_bytes"] / held["planned_bytes"])
    for run in found["start"].values():
        assert min(run["first_image_s"], run["second_image_s"]) > 0
        assert 1 < run["passes"] <= 19
    for both in found["attention"].values():
        assert both["largest_difference"] < 0.02, "both are the same attention"
    eager = {(r["window"], r["rows"]): r for r in found["passes"]["emu3"] if r["engine"] == "eager"}
    follows = found["speedup"]["emu3"]
    assert follows["over_this_ar"] == pytest.approx(5.62 / eager[4, 1]["cost_over_ar"])


def test_what_is_there_is_not_measured_again(measured, capsys, monkeypatch):
    path, parts = measured
    monkeypatch.setitem(gpu_parts.PARTS, "card", lambda bench: {"again": 1})
    assert gpu.measure(path, None, smoke=True, device=torch.device("cpu"))
    assert json.loads(path.read_text())["parts"] == parts
    assert gpu.measure(path, ["card"], smoke=True, device=torch.device("cpu"))
    assert json.loads(path.read_text())["parts"]["card"]["found"] == {"again": 1}


def test_a_part_that_fails_is_written_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(bench):
        raise ValueError("no card")

    monkeypatch.setitem(gpu_parts.PARTS, "card", fails)
    path = tmp_path / "gpu.json"
    assert not gpu.measure(path, ["card", "attention"], smoke=True, device=torch.device("cpu"))
    parts = json.loads(path.read_text())["parts"]
    assert parts["card"]["error"] == "ValueError: no card"
    assert "found" in parts["attention"]


def test_own_work_has_neither_trunk_nor_head():
    backbone = gpu_cells.build(gpu_cells.SMALL["lumina"], torch.device("cpu"))
    config, calls = gpu_cells.config_of(4, True, "eager"), []
    backbone.trunk.norm.register_forward_hook(lambda *_: calls.append(1))
    gpu_cells.pass_ms(backbone, config, 1, 64)
    whole = len(calls)
    gpu_cells.own_ms(backbone, config, 1, 64)
    assert whole > 4
    assert len(calls) - whole == 1, "the prompt"
    gpu_cells.pass_ms(backbone, config, 1, 64)
    assert len(calls) == 2 * whole + 1, "the trunk is back"


def test_released_shapes():
    """Parameters of the layers as published: 6.5, 7.0 and 6.1 billion."""
    for name, billions in {"lumina": 6.5, "emu3": 7.0, "janus": 6.1}.items():
        release = gpu_cells.RELEASES[name]
        assert release.sizes.keys() == SIZES.keys()
        sizes = release.sizes
        width, keys = sizes["hidden_size"], sizes["num_key_value_heads"] / sizes["num_attention_heads"]
        layer = width**2 * (2 + 2 * keys) + 3 * width * sizes["intermediate_size"]
        assert layer * sizes["num_hidden_layers"] / 1e9 == pytest.approx(billions, rel=0.02)
