"""Publishes an evaluation as a W&B Report: text of report.md, media of a run.

Of an offline evaluation, send the run first (`wandb sync`). Needs the extra
`reports` (wandb-workspaces). Building a report needs neither login nor network,
publishing needs both.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from sjd2_lightning.report.wandb_log import log_suffixes
from sjd2_lightning.run.stages import speak, stage

_MEDIA = ("images", "passes", "cost", "settling")
_NEEDS_EXTRA = (
    "report.publish=wandb needs wandb-workspaces: install it with `pip install 'sjd2-lightning[reports]'`, "
    "or set report.publish=none"
)


def build_report(
    report: Mapping[str, Any], markdown: str, *, project: str, entity: str = "", run_id: str = ""
) -> Any:
    """A report that is not published yet.

    Args:
        report: content of report.json.
        markdown: content of report.md.
        project, entity: W&B project and account that it will belong to.
        run_id: id of the run that holds images and figures; "" shows all runs of the project.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    workspaces = _workspaces()
    only = f"ID = '{run_id}'" if run_id else ""
    runs = workspaces.Runset(entity=entity, project=project, filters=only)
    suffixes = log_suffixes(list(report["methods"])).values()
    media = [
        workspaces.MediaBrowser(title=name, media_keys=[f"eval/{name}"], num_columns=1) for name in _MEDIA
    ]
    bars = [
        workspaces.BarPlot(title=title, metrics=[f"eval{suffix}/{key}" for suffix in suffixes])
        for key, title in (("speedup", "speedup, wall clock"), ("step_compression", "tokens a pass"))
    ]
    provenance = json.dumps(report["provenance"], indent=2, ensure_ascii=False)
    return workspaces.Report(
        project=project,
        entity=entity,
        title="Decoding methods",
        description=f"{len(report['methods'])} methods on the same prompts and seeds",
        blocks=[
            workspaces.MarkdownBlock(_without_pictures(markdown)),
            workspaces.H2("Images and figures"),
            workspaces.PanelGrid(runsets=[runs], panels=[*media, *bars]),
            workspaces.H2("Provenance"),
            workspaces.CodeBlock(provenance, language="json"),
        ],
    )


def publish_report(folder: str | Path, *, project: str, entity: str | None = None, run_id: str = "") -> str:
    """Publishes the report of a folder and returns its address.

    Args:
        folder: folder of report.json and report.md.
        project, entity: W&B project and account; without an entity the account's default.
        run_id: id of the run that holds images and figures.

    Raises:
        ValueError: nobody is logged in, wandb-workspaces or the report is missing, or the server refuses.
    """
    _workspaces()
    folder = Path(folder)
    if not (folder / "report.json").is_file():
        raise ValueError(f"there is no report.json in {folder}: run evaluate.py with run_dir={folder} first")
    if not wandb.login(prompt=False):
        raise ValueError("nobody is logged in to W&B: run `wandb login` first")
    report, markdown = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()
    try:
        entity = entity or wandb.Api().default_entity or ""
        built = build_report(report, markdown, project=project, entity=entity, run_id=run_id)
        return str(built.save().url)
    except Exception as error:  # the client raises bare exceptions for every refusal of the server
        raise ValueError(f"W&B did not take the report: {' '.join(str(error).split())}") from error


def later_command(
    folder: str | Path, run_folder: str | Path, *, project: str, entity: str | None = None
) -> str:
    """The shell command that sends an offline run and publishes its report.

    Args:
        folder: folder of report.json.
        run_folder: folder of the offline run, from `log_to_wandb`.
        project, entity: W&B project and account of both.
    """
    to = ["--project", project, *(["--entity", entity] if entity else [])]
    sync = shlex.join(["wandb", "sync", *to, str(run_folder)])
    publish = ["python", "-m", "sjd2_lightning.report.wandb_report", str(folder), *to]
    return f"wandb login && {sync} && {shlex.join([*publish, '--run', run_id_of(run_folder)])}"


def run_id_of(run_folder: str | Path) -> str:
    """The run's id, the last part of its folder's name."""
    return Path(run_folder).name.rpartition("-")[2]


def _without_pictures(markdown: str) -> str:
    """The text without its pictures: they are not on the server, and panels show them."""
    return re.sub(r"^!\[[^\]]*\]\([^)]*\)\n+", "", markdown, flags=re.MULTILINE)


def _workspaces() -> Any:
    try:
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise ValueError(_NEEDS_EXTRA) from error
    return v2


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 wandb",
        description=__doc__,
        epilog="example:\n  sjd2 wandb outputs/demo --project sjd2-lightning --run 1a2b3c4d",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="run_dir of an evaluation")
    parser.add_argument("--project", default="sjd2-lightning", help="(default: %(default)s)")
    parser.add_argument("--entity", help="team or user (default: the account's own)")
    parser.add_argument("--run", default="", help="id of the run that holds the images")
    options = parser.parse_args(arguments)
    speak()
    to = {"project": options.project, "entity": options.entity, "run_id": options.run}
    try:
        with stage("publishing"):
            url = publish_report(options.folder, **to)
        print(url)
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
