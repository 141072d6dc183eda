"""benchmarks/thinking.py times passes against the chain and writes its figures."""

import json

from benchmarks import thinking


def test_the_benchmark_of_thinking_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "thinking.json"
    sizes = [
        "--latents",
        "4",
        "--passes",
        "2",
        "--batches",
        "2",
        "--repeats",
        "1",
        "--width",
        "12",
        "--layers",
        "1",
    ]
    thinking.main(["--json", str(path), *sizes])
    found = json.loads(path.read_text())
    assert [(row["kind"], row["batch"]) for row in found["rows"]] == [("step", 2), ("thinking", 2)]
    for row in found["rows"]:
        assert row["share_of_chain"] == row["passes_cpu_ms"] / row["chain_cpu_ms"] > 0
    assert "2 passes against a chain of 4" in capsys.readouterr().out
