"""Shares tuned weights on the Hugging Face hub, with a card from a report.

What will be uploaded is written into a folder first, to be looked at. Where the
upload fails the folder stays, and the same command tries again. Weights are
linked into it, not copied, where the disk can.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from sjd2_lightning.cli.card import Card
from sjd2_lightning.cli.settings import read_settings
from sjd2_lightning.models.hub import PARTS, HubName
from sjd2_lightning.models.lora import holds_noisy_adapter
from sjd2_lightning.models.weights import ADAPTER, ADAPTER_FILE, BACKBONE_FILE, SETTINGS_FILE
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.provenance import TRAININGS_FILE
from sjd2_lightning.run.stages import speak, stage

_GRID = "figures/grid.png"
_BESIDE = (SETTINGS_FILE, TRAININGS_FILE)
_VERSIONS = ("sjd2-lightning", "torch", "transformers")


def main(arguments: list[str] | None = None) -> None:
    """Command line of `sjd2 publish`."""
    options = _parser().parse_args(arguments)
    speak()
    folder = options.folder or Path("outputs") / "publish" / options.repo.replace("/", "--")
    try:
        with stage("writing what will be uploaded"):
            export = export_of(options.run)
            write_folder(export, folder, options.repo, options.report, options.licence, options.adapter)
        if options.dry_run:
            print(f"{folder}: nothing was uploaded; look at it, then run this without --dry-run")
            return
        with stage(f"uploading to {options.repo}"):
            print(upload(folder, options.repo, options.private))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sjd2 publish",
        description=__doc__,
        epilog="example:\n  sjd2 publish outputs/mine --repo me/mine --report outputs/seen --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, help="run_dir of a training, or the folder that it exported")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository; made where there is none")
    add("--report", type=Path, metavar="FOLDER", help="run_dir of an evaluation of these weights")
    add("--adapter", action="store_true", help="upload the low-rank adapter alone")
    add("--licence", default="", metavar="ID", help="as the hub names it, such as mit or apache-2.0")
    add("--private", action="store_true", help="a new repository is seen by its owner alone")
    add("--dry-run", action="store_true", help="write the folder, upload nothing")
    add("--folder", type=Path, help="what will be uploaded (default: outputs/publish/OWNER--NAME)")
    return parser


def export_of(run: Path) -> Path:
    """The folder that a training exported, by that folder or the run's; raises ValueError without one."""
    for folder in (run, run / "model"):
        if (folder / BACKBONE_FILE).is_file() or (folder / ADAPTER_FILE).is_file():
            return folder
    raise ValueError(
        f"{run}: there is neither {BACKBONE_FILE} nor model/{BACKBONE_FILE}; give the run_dir of a training "
        "that has ended, or its export_dir"
    )


def write_folder(
    export: Path, folder: Path, repo: str, report: Path | None, licence: str = "", is_adapter: bool = False
) -> None:
    """Writes what will be uploaded: weights or adapter, settings, trainings, card and a grid of images.

    Args:
        export: folder that training exported.
        folder: where it goes; what an earlier call left there is replaced.
        repo: `owner/name` on the hub.
        report: run_dir of an evaluation of these weights.
        licence: identifier of a licence.
        is_adapter: whether the adapter alone is shared.

    Raises:
        ValueError: a name that can be none, no adapter, an export without settings, a report of others.
    """
    name = HubName.of(f"hf://{repo}")
    if name is None or name.revision is not None:
        raise ValueError(f"--repo {repo}: must be OWNER/NAME")
    weights = export / ADAPTER if is_adapter else export
    if is_adapter and not (weights / ADAPTER_FILE).is_file():
        raise ValueError(f"--adapter: there is none in {weights}; train one with model.peft=lora")
    settings = read_settings(export)
    if "card" not in settings:
        raise ValueError(
            f"{export / SETTINGS_FILE} does not say how the weights were made: an older version exported "
            "them; `sjd2 train` with the same experiment and ckpt_path=last exports again"
        )
    card = Card(**settings["card"])
    measured = "" if report is None else measured_by(report, export)
    is_part = holds_noisy_adapter(export / ADAPTER)  # it is not merged into the weights
    _clear(folder)
    for pattern in PARTS:
        for path in sorted(weights.rglob(pattern)):
            place = path.relative_to(weights)
            if place.parts[0] != ADAPTER or is_part:
                _link(path, folder / place)
    for beside in _BESIDE:
        if (export / beside).is_file():
            _link(export / beside, folder / beside)
    if report is not None and (report / _GRID).is_file():
        _link(report / _GRID, folder / _GRID)
    write_whole(folder / "README.md", card.text(repo, measured, licence, is_adapter))


def measured_by(report: Path, export: Path) -> str:
    """Markdown of a report: its table with intervals, warnings, the images, and where the numbers come from.

    Raises:
        ValueError: there is no report, or it is of other weights than those in `export`.
    """
    try:
        found: dict[str, Any] = json.loads((report / "report.json").read_text())
        text, provenance = (report / "report.md").read_text(), found["provenance"]
        of, versions = provenance["weights"].partition(", trained from ")[0], provenance["versions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--report {report}: there is no report of an evaluation ({error})") from error
    if Path(of).resolve() != export.resolve():
        raise ValueError(f"--report {report}: it is of the weights {of}, not of {export}; evaluate these")
    newest = max(path.stat().st_mtime for path in export.rglob("*.safetensors"))
    if (report / "report.json").stat().st_mtime < newest:
        raise ValueError(f"--report {report}: it is older than the weights in {export}; evaluate them again")
    table, _, rest = text.partition("\n![images]")
    last = rest.strip().splitlines()[-1] if rest.strip() else ""
    used = ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions)
    lines = [table.partition("\n")[2].strip().replace("\n## ", "\n### "), ""]
    lines += [f"![images]({_GRID})", ""] if (report / _GRID).is_file() else []
    return "\n".join([*lines, last.replace(str(of), "of this repository"), "", f"Measured with {used}."])


def upload(folder: Path, repo: str, is_private: bool = False) -> str:
    """Uploads a folder in one commit and returns the commit's address.

    Raises:
        ValueError: the hub refuses or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repo, private=is_private or None, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Weights, settings and card"
        )
    except Exception as error:  # refusals have many classes, those of the network are other packages'
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--repo {repo}: the upload failed ({type(error).__name__}: {why}). Nothing is lost: what would "
            f"be uploaded is in {folder}. Log in with `hf auth login`, look at name and network, then run "
            "the same command again"
        ) from error
    return str(done.commit_url)


def _clear(folder: Path) -> None:
    """Removes what an earlier call wrote; raises ValueError for a folder of somebody else."""
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / "README.md").is_file():
        raise ValueError(f"--folder {folder}: holds files that this command did not write; give a new folder")
    shutil.rmtree(folder)


def _link(source: Path, place: Path) -> None:
    """A file that takes no room on the disk of its source; a copy elsewhere."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)


if __name__ == "__main__":
    main()
