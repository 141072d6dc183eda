"""Hydra around a job: one clear message for a wrong configuration, a folder for each run."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.instantiate import _instantiate2
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sjd2_lightning.config.reading import ALLOWED_TARGETS, conf_dir
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.processes import HANDED_DOWN, started_by_lightning

log = logging.getLogger(__name__)

# The environment of one run, as Lightning's launcher and ours leave it; a sweep's next run must not find it.
_OF_A_RUN = (
    HANDED_DOWN,
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
)
_MISSPELT = re.compile(r"Could not override '(?P<key>[^']+)'")


def launch(script: str, job: Callable[[DictConfig], object]) -> None:
    """Runs a job under Hydra, as the command line asks: once, or once for each point of a sweep (`-m`).

    Args:
        script: "train" or "evaluate", a root of `conf/`.
        job: gets the composed configuration, whose `run_dir` is the run's own folder.

    A wrong configuration, and any other ValueError that this package raises, ends in its message and exit
    status 2; every other error keeps its traceback. In a sweep a run that fails does not stop the others: it
    is listed in the sweep's report, and the exit status is 1 if all of them failed.
    """

    def run(cfg: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if folder.is_relative_to(Path.cwd()):  # reports name it, and say nothing about the machine then
            folder = folder.relative_to(Path.cwd())
        with open_dict(cfg):
            cfg.run_dir = str(folder)
        with _handing_down(script, list(HydraConfig.get().overrides.task), str(folder)):
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _run_in_sweep(job, cfg, folder)
            else:
                job(cfg)

    logging.raiseExceptions = False  # a line that a full disk does not take is not worth a traceback each
    # whatever a library asks for, no file of this process is unpickled
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if started_by_lightning():
        _run_as_further_rank(script, job)
        return
    restrict_targets()
    # Otherwise Hydra prints errors itself, cut short, and exits before the lines below.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    SweepReport.all_failed = False
    start = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=script)(run)
    try:
        start()
    except HydraException as error:
        sys.exit(_fail(_with_suggestion(script, error)))
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(Path(__file__).resolve().parents[1]):
            raise
        sys.exit(_fail(f"{error}"))
    if SweepReport.all_failed:
        sys.exit(1)


@contextmanager
def _handing_down(script: str, overrides: list[str], folder: str) -> Iterator[None]:
    """Tells the processes that Lightning starts for further ranks which run they belong to.

    Lightning repeats the command line for them. In a sweep that would be the whole sweep, in folders of its
    own; and the run's folder may hold the time.
    """
    before = {name: os.environ.get(name) for name in _OF_A_RUN}
    os.environ[HANDED_DOWN] = json.dumps({"script": script, "overrides": overrides, "run_dir": folder})
    try:
        yield
    finally:
        if before["LOCAL_RANK"] is None and "LOCAL_RANK" in os.environ and "torch" in sys.modules:
            from torch import distributed

            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()  # its other members end with this run
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _run_as_further_rank(script: str, job: Callable[[DictConfig], object]) -> None:
    """Takes part in the run of the process that Lightning started this one from; that one reports."""
    handed = json.loads(os.environ[HANDED_DOWN])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(script, handed["overrides"])
    with open_dict(cfg):
        cfg.run_dir = handed["run_dir"]
    job(cfg)


def _run_in_sweep(job: Callable[[DictConfig], object], cfg: DictConfig, folder: Path) -> None:
    from sjd2_lightning.report.sweep import write_job

    outcome, message = None, None
    try:
        outcome = job(cfg)
    except Exception as error:  # whatever stops one run, the others go on
        log.error("this run of the sweep failed", exc_info=not isinstance(error, ValueError))
        message = " ".join(str(error).split()) or type(error).__name__
    with harmless(f"noting the run in {folder} for the sweep's report"):
        write_job(folder, list(HydraConfig.get().overrides.task), outcome, message)


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def composed(script: str, overrides: list[str]) -> DictConfig:
    """The configuration as the command line composes it, for commands that Hydra does not run.

    Raises:
        ValueError: an override is wrong; the message names the key, and a close one.
    """
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(script, overrides)
    except HydraException as error:
        raise ValueError(_with_suggestion(script, error)) from error


def _with_suggestion(script: str, error: HydraException) -> str:
    message = str(error).strip()
    misspelt = _MISSPELT.search(message)
    if misspelt is None:
        return message
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        known = list(_keys(OmegaConf.to_container(compose(script), resolve=False)))
    key = misspelt["key"]
    close = difflib.get_close_matches(key, known, n=3)
    hint = (
        f"did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else "see the files in conf/"
    )
    return f"The configuration has a problem:\n  - {key}: unknown key; {hint}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from _keys(value, f"{prefix}{name}.")


# Hydra instantiates names of its own part of a configuration before `config.reading` has seen the rest. A
# configuration file from somebody else may carry such keys, so they are compared with a list too.
OF_HYDRA = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "sjd2_lightning.cli.launch.SweepReport",
    }
)


def restrict_targets() -> None:
    """From now on Hydra calls no name that is not on the lists, in this process."""
    inner = _instantiate2._resolve_target
    if getattr(inner, "restricted", False):
        return

    def resolve(target: str | Callable[..., Any], full_key: str) -> Any:
        name = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
        if name not in ALLOWED_TARGETS | OF_HYDRA:
            raise InstantiationException(f"{full_key or '_target_'}={name}: this target is not allowed")
        return inner(target, full_key)

    resolve.restricted = True  # type: ignore[attr-defined]
    _instantiate2._resolve_target = resolve


class SweepReport(Callback):
    """Writes sweep.csv, sweep.md, sweep.html and figures of a sweep into its folder.

    Whatever the launcher: each run writes `job.json` into its folder; they are read once all have ended.
    """

    all_failed: ClassVar[bool] = False

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that started the sweep."""
        from sjd2_lightning.report.sweep import job_titles, read_sweep, write_sweep_report

        folder = Path(config.hydra.sweep.dir)
        jobs = read_sweep(folder)
        if not jobs:
            return
        files = write_sweep_report(jobs, folder)
        SweepReport.all_failed = files.num_failed == len(jobs)
        titles = job_titles(jobs)
        for job in jobs:
            if job.error is not None:
                log.error("failed: %s (%s): %s", titles[job.name], folder / job.name, job.error)
        log.info("sweep of %d runs, %d failed: %s", len(jobs), files.num_failed, files.html)
