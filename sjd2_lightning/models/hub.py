"""Where weights are: a folder, a release on the Hugging Face hub, or a name there that somebody wrote.

A name is `owner/name`, or `owner/name@revision` (a commit, tag or branch), as the hub's own file system
writes it; `hf://` may stand in front. A folder of that name comes first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# safetensors, texts and Cosmos' two programs in TorchScript: never pickles, never Python
PARTS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "tokenizer/*.jit")
_NAME = re.compile(r"(?P<sign>hf://)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_OWN_FOLDERS = ("weights", "outputs", "multirun", "data", ".", "..")  # what lies in one is no owner's


@dataclass(frozen=True)
class HubName:
    """A repository on the hub.

    Attributes:
        hub_id: `owner/name`.
        revision: commit, tag or branch; None is the newest commit of its main branch.
    """

    hub_id: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str | Path) -> HubName | None:
        """What a text names; None where it is a folder, or can be no repository."""
        found = _NAME.fullmatch(str(text))
        if found is None or Path(text).exists():
            return None
        is_plain = found["sign"] is None and found["revision"] is None
        owner = found["id"].partition("/")[0]
        if is_plain and (owner in _OWN_FOLDERS or Path(owner).is_dir()):
            return None
        return cls(found["id"], found["revision"])

    def __str__(self) -> str:
        return self.hub_id if self.revision is None else f"{self.hub_id}@{self.revision}"


def located(path: str | Path, key: str) -> Path:
    """A folder as it is; a repository on the hub is downloaded into the hub's cache, once a process.

    Args:
        path: folder or name.
        key: key of the configuration that says it, for the error.

    Raises:
        ValueError: the repository cannot be had; the message names key and remedy.
    """
    name = HubName.of(path)
    return Path(path) if name is None else _snapshot(name, key)


@lru_cache
def _snapshot(name: HubName, key: str) -> Path:
    try:
        return download(name)
    except OSError as error:
        raise ValueError(f"{key}={name}: {error}; or give a folder that is here") from error


def download(name: HubName, local_files_only: bool = False) -> Path:
    """The folder of a repository in the hub's cache; what is missing there is downloaded.

    Raises:
        OSError: why it cannot be had, and what can be done about it.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = huggingface_hub.snapshot_download(
            name.hub_id,
            revision=name.revision,
            local_files_only=local_files_only,
            allow_patterns=list(PARTS),
        )
    except GatedRepoError as error:
        why = f"its owner lets in who has asked: open {name.hub_id} on the hub, then `hf auth login`"
        raise OSError(why) from error
    except RepositoryNotFoundError as error:
        why = "the hub has no such repository, or it is private: look at its name, or `hf auth login`"
        raise OSError(why) from error
    except RevisionNotFoundError as error:
        raise OSError(f"it has no revision {name.revision}; leave out @ for its newest") from error
    except (LocalEntryNotFoundError, OSError, ValueError, HfHubHTTPError) as error:
        pin = f" --revision {name.revision}" if name.revision else ""
        raise OSError(
            "it is neither in the hub's cache nor could it be downloaded "
            f"({type(error).__name__}): with a network, `HF_HUB_OFFLINE=0 hf download {name.hub_id}{pin}`"
        ) from error
    return Path(folder)


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
        try:
            return download(HubName(self.hub_id, self.revision), self.local_files_only)
        except OSError as error:
            wanted = f"{self.hub_id} at revision {self.revision or 'main'}"
            raise ValueError(
                f"no backbone in {self.path}, and {wanted} is neither in the hub's cache nor could it be "
                f"downloaded ({type(error.__cause__).__name__}); {self.remedy()}"
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
