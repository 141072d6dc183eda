"""Hydra around a job: one clear message for a wrong configuration, a folder for each run."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
from omegaconf.errors import OmegaConfBaseException

from sjd2_lightning.cli.arguments import one_line, readable_arguments, with_suggestion
from sjd2_lightning.cli.naming import SWEPT, name_run, num_runs, swept_keys
from sjd2_lightning.cli.settings import with_settings
from sjd2_lightning.config.reading import ALLOWED_TARGETS, conf_dir
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.run.files import remove
from sjd2_lightning.run.harmless import harmless
from sjd2_lightning.run.owner import Taken
from sjd2_lightning.run.processes import HANDED_DOWN, started_by_lightning
from sjd2_lightning.run.stages import A_MINUTE, duration, stage

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
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


def launch(
    script: str, job: Callable[[DictConfig], object], check: Callable[[DictConfig], str | None] | None = None
) -> None:
    """Runs a job under Hydra, as the command line asks: once, or once for each point of a sweep (`-m`).

    Args:
        script: "train" or "evaluate", a root of `conf/`.
        job: gets the composed configuration, whose `run_dir` is the run's own folder.
        check: gets the same before that folder is made, and raises ValueError for what cannot run; what it
            returns is printed and ends the command well, None lets the job begin. A sweep's jobs check
            themselves.

    A wrong configuration, and any other ValueError that this package raises, ends in its message and exit
    status 2; every other error keeps its traceback. In a sweep a run that fails does not stop the others: it
    is listed in the sweep's report, and the exit status is 1 if all of them failed.
    """

    def run(cfg: DictConfig) -> float:
        folder = run_folder(HydraConfig.get().runtime.output_dir)
        with open_dict(cfg):
            cfg.run_dir = str(folder)
        hydra_config, overrides = HydraConfig.get(), list(HydraConfig.get().overrides.task)
        in_sweep = hydra_config.mode == RunMode.MULTIRUN
        name_run(cfg, overrides, folder, hydra_config.runtime.choices.get("experiment"), in_sweep)
        with _handing_down(script, overrides, str(folder)):
            if in_sweep:
                return _run_in_sweep(script, job, cfg, folder)
            _run_alone(script, job, cfg, folder)
        return math.nan

    logging.raiseExceptions = False  # a line that a full disk does not take is not worth a traceback each
    # whatever a library asks for, no file of this process is unpickled
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if started_by_lightning():
        _run_as_further_rank(script, job)
        return
    restrict_targets()
    # Otherwise Hydra prints errors itself, cut short, and exits before the lines below.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    SweepReport.all_failed, Preflight.check = False, check
    try:
        refuse_missing_sweeper(sys.argv[1:])
        sys.argv[1:] = with_settings(script, readable_arguments(script, sys.argv[1:]))
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=script)(run)()
    except Exception as error:
        message = refusal(script, error)
        if message is None:
            raise
        sys.exit(_fail(message))
    if SweepReport.all_failed:
        sys.exit(1)


def refuse_missing_sweeper(arguments: list[str]) -> None:
    """Raises ValueError, with the command to install it, where a search needs a package that is not there."""
    if "hparams_search=optuna" not in arguments:
        return
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            "hparams_search=optuna: the package hydra-optuna-sweeper is not installed; "
            "`pip install 'sjd2-lightning[optuna]'`"
        )
    if not {"-m", "--multirun"} & set(arguments):
        raise ValueError("hparams_search=optuna: a search is a sweep; add -m")


def objective(outcome: object, name: str | None) -> float:
    """The number of an evaluation that a search tunes: of the first method that is not the baseline.

    Args:
        outcome: what the run returned, the content of report.json.
        name: `tokens_per_second`, or a number of a method in report.json; None tunes nothing.

    Raises:
        ValueError: there is no such number.
    """
    methods = outcome.get("methods") if isinstance(outcome, Mapping) else None
    if name is None or not methods:
        return math.nan
    own = next((numbers for method, numbers in methods.items() if method != BASELINE), None)
    own = own or methods[BASELINE]
    if name == "tokens_per_second":
        return float(own["step_compression"] * own["nfe"] / own["seconds_per_image"])
    if not isinstance(own.get(name), (int, float)):
        known = ", ".join(key for key, value in own.items() if isinstance(value, (int, float)))
        raise ValueError(f"optimized_metric={name}: no such number; use tokens_per_second, {known}")
    return float(own[name])


def run_folder(output_dir: str) -> Path:
    """The folder of a run, as reports name it: they say nothing about the machine where it can be helped."""
    folder = Path(output_dir)
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def refusal(script: str, error: Exception) -> str | None:
    """What to print of an error that is the user's to mend; None for others, which keep their traceback."""
    if isinstance(error, HydraException):
        return one_line(with_suggestion(script, error))
    if isinstance(error, OmegaConfBaseException):
        key = f"{error.full_key}: " if error.full_key else ""
        return one_line(f"The configuration has a problem: {key}{str(error).splitlines()[0]}")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:  # wherever Python noticed it
        return f"{error}: what was finished is kept; make room, and start the command again"
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = raised_in.is_relative_to(Path(__file__).resolve().parents[1])
    if is_ours and isinstance(error, ValueError | FloatingPointError | OSError):
        return f"{error}"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, of values that do not go together
        return one_line(f"The configuration has a problem: trainer: {error}")
    return None


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


def _run_alone(script: str, job: Callable[[DictConfig], object], cfg: DictConfig, folder: Path) -> None:
    try:
        job(cfg)
    except Exception as error:
        message = refusal(script, error)
        if message is None:
            raise
        sys.exit(_fail(message))  # Hydra would print the overrides above it
    finally:
        _wrote_nothing(script, folder)


def _run_in_sweep(script: str, job: Callable[[DictConfig], object], cfg: DictConfig, folder: Path) -> float:
    """The number that a search tunes; NaN where there is none, or the run failed."""
    from sjd2_lightning.report.sweep import write_job

    outcome, message, tuned, is_taken = None, None, math.nan, False
    try:
        outcome = job(cfg)
        tuned = objective(outcome, cfg.get("optimized_metric"))
    except Exception as error:  # whatever stops one run, the others go on
        log.error("this run of the sweep failed", exc_info=not isinstance(error, ValueError))
        message = " ".join(str(error).split()) or type(error).__name__
        is_taken = isinstance(error, Taken)
    is_gone = _wrote_nothing(script, folder)
    if message is None and (is_gone or not outcome):
        return tuned  # a plan, or a run that was at its end before
    with harmless(f"noting the run in {folder} for the sweep's report"):
        overrides = list(HydraConfig.get().overrides.task)
        write_job(folder, overrides, outcome, message, is_owned=not (is_gone or is_taken))
    return tuned


def _wrote_nothing(script: str, folder: Path) -> bool:
    """Whether a run left nothing in its folder but Hydra's log; the folder is removed then."""
    log_file = folder / f"{script}.log"
    if not folder.is_dir() or any(path != log_file for path in folder.iterdir()):
        return False
    with suppress(OSError):
        remove(log_file)
        folder.rmdir()
    return True


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
            return compose(script, with_settings(script, readable_arguments(script, overrides)))
    except HydraException as error:
        raise ValueError(with_suggestion(script, error)) from error


# Hydra instantiates names of its own part of a configuration before `config.reading` has seen the rest. A
# configuration file from somebody else may carry such keys, so they are compared with a list too.
OF_HYDRA = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
        "optuna.samplers.TPESampler",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "sjd2_lightning.cli.launch.Preflight",
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


class Preflight(Callback):
    """Checks a single run before Hydra makes its folder and opens its log: what is refused leaves nothing."""

    check: ClassVar[Callable[[DictConfig], str | None] | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra, which would turn other exceptions than SystemExit into warnings."""
        check = type(self).__dict__["check"]
        if check is None:
            return
        cfg = copy.deepcopy(config)
        with open_dict(cfg):
            folder = OmegaConf.select(cfg, "hydra.run.dir", throw_on_resolution_failure=False)
            del cfg["hydra"]
            if isinstance(folder, str) and folder not in ("", cfg.run_dir):  # hydra.run.dir was given
                cfg.run_dir = str(run_folder(folder))
        try:
            answer = check(cfg)
        except (OmegaConfBaseException, ValueError) as error:
            message = refusal(str(config.hydra.job.name), error)
            if message is None:
                raise
            sys.exit(_fail(message))
        if answer is not None:
            print(answer, end="\n" if answer else "")
            sys.exit(0)


@dataclass
class SweepPace:
    """Runs of a sweep, one after another in one process: how many ended, and since when."""

    pid: int
    num_runs: int
    start: float
    ended: int = 0

    def after_one_more(self) -> str:
        """What to say after a further run has ended; nothing after the last, or in quick sweeps."""
        self.ended += 1
        taken = time.perf_counter() - self.start
        left = taken / self.ended * (self.num_runs - self.ended)
        if left <= 0 or taken + left < A_MINUTE:
            return ""
        return f"run {self.ended} of {self.num_runs} has ended; about {duration(left)} left"


class SweepReport(Callback):
    """Writes sweep.csv, sweep.md, sweep.html and figures of a sweep into its folder.

    Whatever the launcher: each run writes `job.json` into its folder, or beside it if it was refused; they
    are read once all have ended. Where all runs were refused, or were plans, nothing is left.
    """

    all_failed: ClassVar[bool] = False
    pace: ClassVar[SweepPace | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tells the jobs which keys are swept; called by Hydra in the process that starts the sweep."""
        further = config.hydra.sweeper.get("params") or {}
        os.environ[SWEPT] = json.dumps(swept_keys(config.hydra.overrides.task, further))
        SweepReport.pace = SweepPace(os.getpid(), num_runs(config.hydra.overrides.task), time.perf_counter())

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Says how long the runs to come will take; where they run side by side there is nothing to tell."""
        pace = SweepReport.pace
        if pace is not None and pace.pid == os.getpid() and (line := pace.after_one_more()):
            log.info("%s", line)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that started the sweep."""
        from sjd2_lightning.report.sweep import job_titles, read_sweep, write_sweep_report

        folder = Path(config.hydra.sweep.dir)
        jobs = read_sweep(folder)
        failed = [job for job in jobs if job.error is not None]
        SweepReport.all_failed = bool(jobs) and len(failed) == len(jobs)
        titles = job_titles(jobs)
        for job in failed:
            log.error("failed: %s (%s): %s", titles[job.name], folder / job.name, job.error)
        if not any((folder / job.name).is_dir() for job in jobs):
            _remove_sweep(folder)
            return
        with stage("writing the sweep's report"):
            files = write_sweep_report(jobs, folder)
        log.info("sweep of %d runs, %d failed: %s", len(jobs), files.num_failed, files.html)


def _remove_sweep(folder: Path) -> None:
    """Removes what Hydra and refused runs wrote beside the folders of runs, and what is empty then."""
    for path in [folder / "multirun.yaml", *folder.glob("*.job.json")]:
        remove(path)
    with suppress(OSError):  # the first one that holds something else ends it
        for place in (folder, *folder.parents):
            if place.resolve() != Path.cwd():
                place.rmdir()
