"""benchmarks/judge.py writes every row of its table."""

import json

import pytest

from benchmarks import judge


@pytest.mark.slow
def test_the_benchmark_of_the_judge_writes_all_rows(tmp_path, capsys):
    options = ["--per-category", "2", "--codebook-scenes", "8", "--named-scenes", "3"]
    judge.main([*options, "--json", str(tmp_path / "judge.json"), "--mistakes", str(tmp_path / "wrong.png")])
    found = json.loads((tmp_path / "judge.json").read_text())
    assert found["rows"]["real"]["overall"][0] == 1
    assert found["rows"]["captions of other scenes"]["overall"][0] == 0
    assert found["rows"]["captions with one thing changed"]["overall"][0] == 0
    assert set(found["psnr"]) < set(found["rows"])
    assert set(found["naming"]["real"]) == {"matching", "features"}
    assert (tmp_path / "wrong.png").stat().st_size > 1000
    assert "images/s on one thread" in capsys.readouterr().out
