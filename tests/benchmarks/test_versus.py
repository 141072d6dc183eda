"""Two checkouts against each other: here one against itself."""

import json
import subprocess
import sys

import pytest

from benchmarks.versus import summed_up
from tests.tools.source import REPO


@pytest.mark.slow
def test_a_checkout_agrees_with_itself(tmp_path):
    path = tmp_path / "versus.json"
    words = [sys.executable, "benchmarks/versus.py", str(REPO), "--json", str(path)]
    subprocess.run([*words, "--methods", "sjd2", "--repeats", "2", "--rounds", "2"], cwd=REPO, check=True)
    found = json.loads(path.read_text())["sjd2"]
    assert found["same_tokens_and_passes"]
    assert len(found["seconds"]) == 2
    for seconds in found["seconds"]:
        assert len(seconds["this"]) == len(seconds["other"]) == 2, "the first one is not counted"


def test_ratios_are_of_rounds():
    rounds = [
        {"same_tokens_and_passes": True, "seconds": {"other": [2.0, 4.0, 9.0], "this": [1.0, 1.0, 3.0]}},
        {"same_tokens_and_passes": False, "seconds": {"other": [1.0], "this": [2.0]}},
    ]
    found = summed_up(rounds)
    assert found["median_ratio"] == pytest.approx((3.0 + 0.5) / 2)
    assert found["range"] == [0.5, 3.0]
    assert found["fastest_ratio"] == 1.0
    assert not found["same_tokens_and_passes"], "once is enough"
    assert summed_up(rounds[:1])["same_tokens_and_passes"]


def test_what_is_no_checkout_is_named(tmp_path):
    words = [sys.executable, "benchmarks/versus.py", str(tmp_path)]
    ran = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "is no checkout of this package" in ran.stderr
