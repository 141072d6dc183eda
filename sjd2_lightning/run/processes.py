"""Ranks, Slurm job and run id of this process, and what it hands down to those that Lightning starts."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

HANDED_DOWN = "SJD2_HANDED_DOWN"  # environment variable: the run's overrides and folder, as JSON


def started_by_lightning() -> bool:
    """Whether this process is one that Lightning started beside the one of the user's command."""
    return HANDED_DOWN in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process of a run that writes shared files, before any process group exists."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((environment[name] for name in names if name in environment), "0") == "0"


def slurm_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The number of the Slurm batch job that this process belongs to; None outside one."""
    if environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    job = environment.get("SLURM_JOB_ID", "")
    if environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return job if re.fullmatch(r"\d+(_\d+)?", job) else None


def run_id(environment: Mapping[str, str] = os.environ, arguments: list[str] | None = None) -> str:
    """A name for a run's folder that all its processes share, and that a job which is queued again finds.

    Under Slurm the job's number with a sum of the command (one job may run several), under torchrun the name
    of its rendezvous, otherwise the time.

    Raises:
        ValueError: several processes were started from outside and share no name.
    """
    if job := slurm_job(environment):
        command = "\0".join(sys.argv[1:] if arguments is None else arguments)
        return f"slurm-{job}-{hashlib.sha256(command.encode()).hexdigest()[:6]}"
    rendezvous = environment.get("TORCHELASTIC_RUN_ID", "none")
    if rendezvous != "none":
        return rendezvous
    if int(environment.get("WORLD_SIZE", "1")) > 1 and HANDED_DOWN not in environment:
        raise ValueError(
            "run_dir: the processes of this run have no name in common; give all of them one folder, "
            "run_dir=outputs/train/NAME, or torchrun a name, --rdzv-id=NAME"
        )
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


T = TypeVar("T")


def current_rank() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) outside `torch.distributed`."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Returns once all processes have come here."""
    from torch import distributed

    if current_rank()[1] > 1:
        distributed.barrier()


@contextmanager
def failing_together() -> Iterator[None]:
    """Waits for all processes at its end; an OSError of one, such as a full disk, is raised on every one.

    What is inside waits for no other process. Without it those that did not fail would wait for ever.
    """
    from torch import distributed

    error: OSError | None = None
    try:
        yield
    except OSError as caught:
        error = caught
    num_processes = current_rank()[1]
    if num_processes > 1:
        said: list[str | None] = [None] * num_processes
        distributed.all_gather_object(said, None if error is None else str(error))
        error = error or next((OSError(text) for text in said if text is not None), None)
    if error is not None:
        raise error


def from_rank_zero(value: T) -> T:
    """What rank 0 holds, on every rank."""
    from torch import distributed

    if current_rank()[1] == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]
