"""Where pretrained weights lie: a local folder, or a hub's repository pinned to a revision.

Only safetensors are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

BACKBONE_FILE = "backbone.json"  # in folders that this package wrote: family and control tokens
TRUNK, TEXT, TOKENIZER, ADAPTER = "trunk", "text", "tokenizer", "adapter"  # their sub-folders
PARTS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # never pickles, never code


@dataclass(frozen=True)
class WeightsSource:
    """Where a backbone is loaded from.

    Attributes:
        path: local folder; used if it is there.
        hub_id: repository on the Hugging Face hub, used if `path` is not there.
        revision: commit or tag of that repository; None is its newest.
        local_files_only: True never opens a connection: the repository must lie in the hub's local cache.
        get: shell command that gets the weights, where downloading the repository is not all there is to it;
            they are then only read from `path`.
    """

    path: str | Path
    hub_id: str | None = None
    revision: str | None = None
    local_files_only: bool = True
    get: str | None = None

    def command(self) -> str:
        """The shell command that gets the weights; empty where there is no repository to get them from."""
        if self.get is not None:
            return self.get
        if self.hub_id is None:
            return ""
        pin = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.hub_id}{pin} --local-dir {self.path}"

    def remedy(self) -> str:
        """What to do where the weights are missing."""
        if not self.command():
            return "set model.path to a backbone folder, such as an export_dir"
        if self.get is not None:
            return f"get them with `{self.get}`"
        return (
            f"get them with `{self.command()}`, or let model.local_files_only=false download {self.hub_id} "
            "into the hub's cache"
        )

    def folder(self) -> Path:
        """The local folder of the weights, downloaded if that is allowed.

        Raises:
            ValueError: if there is none, or one of another revision; the message names the command that
                gets it.
        """
        if Path(self.path).is_dir():
            self._check_revision(Path(self.path))
            return Path(self.path)
        if self.hub_id is None or self.get is not None:
            raise ValueError(f"no backbone in {self.path}: there is no such folder; {self.remedy()}")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return Path(
                snapshot_download(
                    self.hub_id,
                    revision=self.revision,
                    local_files_only=self.local_files_only,
                    allow_patterns=list(PARTS),
                )
            )
        except (OSError, ValueError, HfHubHTTPError) as error:
            wanted = f"{self.hub_id} at revision {self.revision or 'main'}"
            raise ValueError(
                f"no backbone in {self.path}, and {wanted} is neither in the hub's cache nor could it be "
                f"downloaded ({type(error).__name__}); {self.remedy()}"
            ) from error

    def _check_revision(self, folder: Path) -> None:
        """Refuses a folder whose download left word of another commit; a tag is not known to it."""
        if self.revision is None or not re.fullmatch("[0-9a-f]{7,40}", self.revision):
            return
        for record in sorted((folder / ".cache" / "huggingface" / "download").glob("*.metadata")):
            commit = record.read_text().split("\n", 1)[0]
            if not commit.startswith(self.revision):
                raise ValueError(
                    f"{folder / record.stem} is of revision {commit}, not {self.revision} as model.revision "
                    f"asks; {self.remedy()}, or change model.revision"
                )


def missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that a folder in Hugging Face layout lacks, its config included."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    return [name for name in ("config.json", *sorted(names)) if not (folder / name).is_file()]


def check_folder(folder: Path, model_type: str, remedy: str) -> None:
    """Refuses a folder that does not hold the safetensors of a model of one type.

    Args:
        folder: in Hugging Face layout.
        model_type: that its config.json must have.
        remedy: what the reader can do about it.

    Raises:
        ValueError: naming what is missing, or the family that the folder is of.
    """
    if missing := missing_weights(folder):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        why = (
            f" (it has {', '.join(pickles)}, but a pickle can run code while it is read: safetensors only)"
            if pickles
            else ""
        )
        raise ValueError(f"no backbone in {folder}: {', '.join(missing)} missing{why}; {remedy}")
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != model_type:
        raise ValueError(f"{folder} holds a model of type {found!r}, not {model_type!r}; {remedy}")


def read_backbone_file(folder: Path, family: str) -> dict[str, object]:
    """Fields of `backbone.json`; empty for a folder in plain Hugging Face layout.

    Raises:
        ValueError: if the folder is of another family.
    """
    path = folder / BACKBONE_FILE
    if not path.is_file():
        return {}
    fields = json.loads(path.read_text())
    found = fields.pop("family", None)
    if found != family:
        raise ValueError(f"{path} is of the family {found!r}, not {family!r}; set model.family to {found}")
    return fields
