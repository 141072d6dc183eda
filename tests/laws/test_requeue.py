"""The command line as a cluster uses it: told to end, queued again, swept over ranks; one run throughout."""

import csv
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from tests.tools.source import REPO
from tests.tools.training_runs import SETTINGS, make_folder
from tests.tools.wandb_files import run_file

pytestmark = [pytest.mark.slow, pytest.mark.resume]

NO_LOGGER = "logger=none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


def started(folder, cwd, *overrides, **environment):
    """A run of train.py as a process of its own."""
    names = [f"model.path={folder / 'model'}", f"data.data_dir={folder / 'data'}"]
    log = (cwd / "log.txt").open("a")
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *SETTINGS, *names, *overrides],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | environment,
        stdout=log,
        stderr=log,
    )


def wait_for(there, process, timeout_s=600):
    """Until something is there."""
    deadline = time.monotonic() + timeout_s
    while not there():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slurm_job_that_is_queued_again_is_one_run(folder, tmp_path):
    stub = tmp_path / "scontrol"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["logger=wandb", "trainer.max_steps=2000", "ckpt_path=auto", "trainer.log_every_n_steps=1"]
    command += ["trainer.val_check_interval=6", "callbacks.lr_monitor=false"]
    runs = tmp_path / "outputs" / "train"
    ends = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process = started(folder, tmp_path, *command, **slurm)
        before = {path: path.stat().st_mtime for path in runs.glob("*/checkpoints/*.ckpt")}
        wait_for(
            lambda before=before: any(
                path.stat().st_mtime > before.get(path, 0) for path in runs.glob("*/checkpoints/last.ckpt")
            ),
            process,
        )
        process.send_signal(number)
        assert process.wait(300) == 143, (tmp_path / "log.txt").read_text()[-3000:]
        ends.append(number)
    assert (tmp_path / "calls").read_text() == "requeue 4242\n", "SIGUSR1 puts it back, SIGTERM does not"
    (run,) = runs.iterdir()
    assert run.name.startswith("slurm-4242-")

    parts = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in parts} == {f"run-{(run / 'wandb_id.txt').read_text().strip()}.wandb"}
    assert len(parts) == 2
    rows = [run_file(path)[0] for path in parts]
    steps = [[row["_step"] for row in part] for part in rows]
    assert all(
        row["_step"] == row["trainer/global_step"] for part in rows for row in part if "train/loss" in row
    )
    assert steps[1][0] > 0, "the second part does not begin at 0, where it would hide the first"
    assert steps[1][0] <= steps[0][-1] + 2, "and leaves no gap"
    for part in steps:
        assert part == sorted(set(part)), "one row for each step"
    text = (tmp_path / "log.txt").read_text()
    assert (
        f"wandb sync {parts[0].parent.relative_to(tmp_path)} {parts[1].parent.relative_to(tmp_path)}" in text
    )
    logged = [
        int(row["step"])
        for path in sorted(run.glob("csv/version_*/metrics.csv"))
        for row in csv.DictReader(path.open())
        if row["train/loss"]
    ]
    assert sorted(set(logged)) == list(range(min(logged), max(logged) + 1)), "no step is missing"


def test_a_sweep_over_ranks_has_one_folder_for_each_run(folder, tmp_path):
    """Each run has two ranks, which Lightning starts by the command line: `-m` and all."""
    overrides = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    overrides += ["trainer.max_steps=2", "seed=1,2", "run_dir=sweep", NO_LOGGER, "-m"]
    assert started(folder, tmp_path, *overrides).wait(900) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["0", "1"]
    for job, seed in (("0", 1), ("1", 2)):
        run = tmp_path / "sweep" / job
        assert yaml.safe_load((run / "train.yaml").read_text())["seed"] == seed
        assert (run / "checkpoints" / "last.ckpt").is_file()
        assert (run / "model" / "backbone.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"sweep", "log.txt"}
    assert (tmp_path / "log.txt").read_text().count("Starting with 2 processes") == 2  # once a run


def test_sharded_training_from_the_command_line_exports_whole_weights(folder, tmp_path):
    overrides = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    overrides += ["trainer.max_steps=2", "run_dir=run", "model.activation_checkpointing=full", NO_LOGGER]
    assert started(folder, tmp_path, *overrides).wait(900) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_dir()
    from sjd2_lightning.models.registry import load_backbone

    before, after = (
        load_backbone("chameleon", path) for path in (folder / "model", tmp_path / "run" / "model")
    )
    changed = [
        name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])
    ]
    assert any("layers.0" in name for name in changed)
    assert all(value.isfinite().all() for value in after.state_dict().values() if value.is_floating_point())
