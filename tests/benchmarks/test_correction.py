"""benchmarks/correction.py holds correctors against each other, and none changes an image."""

import json

import pytest

from benchmarks import correction

SCALES, ROUNDS = (1.5, 3.0), 6


@pytest.mark.slow
def test_the_benchmark_of_correctors_writes_its_figures(random_scenes_model, write_codes, tmp_path):
    shards, path = write_codes(16).folder, tmp_path / "correction.json"
    few = ["--num-images", "16", "--num-prompts", "2", "--steps", "2", "--json", str(path)]
    correction.main([str(shards), "--weights", str(random_scenes_model), "--only", "left and above", *few])
    found = json.loads(path.read_text())
    assert [row["guidance"] for row in found] == [*SCALES, *SCALES * ROUNDS]
    assert {row["variant"] for row in found} == {"no corrector", "left and above"}
    assert all(row["interval"][0] <= row["tokens_a_pass"] <= row["interval"][1] for row in found)
    assert [row["rounds"] for row in found[2::2]] == list(correction.VARIANTS[0].rounds)
    assert all(row["gap"] == 0 for row in found[2:4]), "the first of a scale is what others are held against"
