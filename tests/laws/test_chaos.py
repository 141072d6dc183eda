"""SIGKILL at random moments of training and saving: no more is lost than the steps since the last save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.chaos_runs import INTERVAL, NUM_STEPS
from tests.tools.source import REPO
from tests.tools.training_runs import differences, state_of

pytestmark = pytest.mark.chaos

NUM_KILLS = 20


def test_killed_runs_lose_one_interval_at_most_and_end_as_the_uninterrupted_one(tmp_path):
    seed = os.environ.get("CHAOS_SEED", "0")
    command = [sys.executable, "-m", "tests.tools.chaos_runs", str(tmp_path), str(NUM_KILLS), seed]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    kills = found["kills"]
    print(json.dumps(found))
    assert len(kills) >= NUM_KILLS
    assert all(kill["done"] - kill["saved"] <= INTERVAL for kill in kills), kills
    assert any(kill["left"] for kill in kills), "none was killed while it wrote: the test tests too little"
    wanted = state_of(tmp_path / "whole" / "run" / "checkpoints" / "last.ckpt")
    assert wanted["global_step"] == NUM_STEPS
    batches = set((tmp_path / "whole" / "batches.txt").read_text().splitlines())
    for run_dir in map(Path, found["complete"]):
        assert set((run_dir.parent / "batches.txt").read_text().splitlines()) == batches, (
            "data, noise and loss"
        )
        assert not differences(wanted, state_of(run_dir / "checkpoints" / "last.ckpt")), run_dir
        assert not list(run_dir.rglob(".*.writing"))
        assert len(list((run_dir / "checkpoints").iterdir())) == 2, (
            "one and last.ckpt: nothing is left behind"
        )
        assert (run_dir / "model" / "backbone.json").is_file()
