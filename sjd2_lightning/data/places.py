"""Where shards lie: a local folder, or a folder of an object store read through fsspec.

Only an allow-list of stores is opened; nothing here runs a command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

# what has to be installed beside fsspec for each
STORES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "memory": "fsspec",
}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an object store: as much of `pathlib.Path` as reading shards needs."""

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.url.rstrip("/").rpartition("/")[2]

    def is_file(self) -> bool:
        """Whether there is such a file."""
        store, path = self._store()
        with _store_errors(self.url):
            return bool(store.isfile(path))

    def num_bytes(self) -> int:
        """Size of the file; raises FileNotFoundError without one."""
        store, path = self._store()
        with _store_errors(self.url):
            return int(store.size(path))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading bytes; whatever a store raises becomes an OSError."""
        store, path = self._store()
        with _store_errors(self.url):
            return cast(BinaryIO, _RemoteFile(store.open(path, mode), self.url))

    def _store(self) -> tuple[Any, str]:
        # anew each time: fsspec keeps instances itself, and drops them in a forked worker
        import fsspec

        try:
            store, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = STORES[self.url.partition("://")[0]]
            raise ValueError(f"{self.url} needs the package {package}: pip install {package}") from error
        return store, path


class _RemoteFile:
    """A file of a store whose errors are OSErrors."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def read(self, size: int = -1) -> bytes:
        with _store_errors(self._url):
            return bytes(self._file.read(size))

    def __enter__(self) -> _RemoteFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each store has error classes of its own
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


Place = Path | RemotePath


def place(location: str | Path | RemotePath) -> Place:
    """A local path or an address of an object store.

    Raises:
        ValueError: the address is of a kind that is not opened (a command, a chain of stores).
    """
    if isinstance(location, RemotePath):
        return location
    text = str(location)
    protocol, mark, rest = text.partition("://")
    if isinstance(location, Path) or not mark:
        if text.startswith("pipe:"):
            raise ValueError(f"{text}: commands are not run; give a folder or an address such as s3://...")
        return Path(location)
    if protocol == "file":
        return Path(rest)
    if protocol not in STORES or "::" in text:
        raise ValueError(
            f"{text}: only local folders and {', '.join(f'{name}://' for name in STORES)} are read"
        )
    return RemotePath(text)


def num_bytes(file: Place) -> int:
    """Size of a file; raises FileNotFoundError without one."""
    return file.num_bytes() if isinstance(file, RemotePath) else file.stat().st_size
