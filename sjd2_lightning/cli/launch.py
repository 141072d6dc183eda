"""Hydra around a job: one clear message for a wrong configuration, a folder for each run."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sjd2_lightning.cli.sweep import SweepReport
from sjd2_lightning.config import conf_dir

log = logging.getLogger(__name__)

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
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _run_in_sweep(job, cfg, folder)
        else:
            job(cfg)

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


def _run_in_sweep(job: Callable[[DictConfig], object], cfg: DictConfig, folder: Path) -> None:
    from sjd2_lightning.report.sweep import write_job

    outcome, message = None, None
    try:
        outcome = job(cfg)
    except Exception as error:  # whatever stops one run, the others go on
        log.error("this run of the sweep failed", exc_info=not isinstance(error, ValueError))
        message = " ".join(str(error).split()) or type(error).__name__
    write_job(folder, list(HydraConfig.get().overrides.task), outcome, message)


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


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
