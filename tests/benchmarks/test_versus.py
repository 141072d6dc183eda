"""Two checkouts against each other: here one against itself."""

import json
import subprocess
import sys

import pytest

from tests.tools.source import REPO


@pytest.mark.slow
def test_a_checkout_agrees_with_itself(tmp_path):
    path = tmp_path / "versus.json"
    words = [sys.executable, "benchmarks/versus.py", str(REPO), "--json", str(path)]
    subprocess.run([*words, "--methods", "sjd2", "--repeats", "2"], cwd=REPO, check=True)
    found = json.loads(path.read_text())["sjd2"]
    assert found["same_tokens_and_passes"]
    fastest = min(found["seconds"]["other"]) / min(found["seconds"]["this"])
    assert found["fastest_ratio"] == fastest
    assert len(found["seconds"]["this"]) == 2, "the first one is not counted"


def test_what_is_no_checkout_is_named(tmp_path):
    words = [sys.executable, "benchmarks/versus.py", str(tmp_path)]
    ran = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "is no checkout of this package" in ran.stderr
