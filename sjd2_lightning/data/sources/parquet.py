"""Captioned pictures of a Hugging Face dataset on disk: parquet files, or what `save_to_disk` wrote.

Needs the optional package pyarrow (``pip install sjd2-lightning[parquet]``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sjd2_lightning.data.captions import CAPTION_FIELDS, plain_caption
from sjd2_lightning.data.names import files_below
from sjd2_lightning.data.sources.record import Record, checked_records, inside, key_of

IMAGE_FIELDS = ("image", "img", "picture", "jpg", "png", "webp")
_BLOCK = 2**32  # rows of a block at most: a record's start is block * _BLOCK + row


def block_of(record: Record) -> tuple[str, int]:
    """What is read at once to get at a record's picture: a row group of a file."""
    return record.file, record.start // _BLOCK


def table_records(root: Path, image_field: str | None, caption_field: str | None) -> list[Record]:
    """Pictures of the .parquet and .arrow files of a folder.

    Args:
        root: the folder.
        image_field: column of the pictures; None finds it by its name.
        caption_field: column of the captions, texts or lists of which the first is taken; None likewise.

    Raises:
        ValueError: pyarrow is missing, there are no files, or the columns are not there.
    """
    names = files_below(root) if root.is_dir() else ()
    paths = [root / name for name in names if name.lower().endswith((".parquet", ".arrow"))]
    if not paths:
        raise ValueError(
            f"{root} has no .parquet or .arrow files; for an imagefolder use the source `folder` instead"
        )
    _pyarrow()
    records: list[Record] = []
    for path in paths:
        name, changed = path.relative_to(root).as_posix(), path.stat().st_mtime_ns
        try:
            records += _records_of(path, name, changed, image_field, caption_field)
        except ValueError as error:
            records.append(Record(key_of(f"{name}/file "), "", name, 0, 0, changed, problem=str(error)))
    return checked_records(records, root, "give a folder of tables with pictures and captions")


def _records_of(
    path: Path, name: str, changed: int, image_field: str | None, caption_field: str | None
) -> Iterator[Record]:
    columns = _columns(str(path), changed)
    _column(path, columns, image_field, IMAGE_FIELDS, "--image-column")
    column = _column(path, columns, caption_field, CAPTION_FIELDS, "--caption-column")
    number = 0
    for block in range(_num_blocks(path)):
        try:
            cells = _block(str(path), changed, block, column)
        except (ValueError, OSError) as error:
            member = f"block {block}"
            key, problem = key_of(f"{name}/{member} "), f"cannot be read ({error})"
            yield Record(key, "", name, block * _BLOCK, 0, changed, member, problem)
            continue
        for row, cell in enumerate(cells):
            caption, problem = "", ""
            try:
                caption = plain_caption(cell.as_py())
            except UnicodeDecodeError:
                problem = "not UTF-8; save it as UTF-8"
            except ValueError as error:
                problem = str(error)
            key, start = key_of(f"{name}/{number}"), block * _BLOCK + row
            yield Record(key, caption, name, start, 0, changed, f"row {number}", problem)
            number += 1


def read_cell(root: str, record: Record, image_field: str | None = None) -> bytes:
    """The bytes of a record's picture; ValueError if they are not there."""
    path, row = Path(root) / record.file, record.start % _BLOCK
    name = _column(path, _columns(str(path), record.changed), image_field, IMAGE_FIELDS, "--image-column")
    value = _block(str(path), record.changed, record.start // _BLOCK, name)[row].as_py()
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            place = inside(Path(root), str(value["path"]))
            if not place.is_file():
                raise ValueError(f"its path {value['path']!r} is no file below {root}")
            return place.read_bytes()
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError(f"column {name} of {record.file} holds no picture in row {row}")
    return value


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "Reading parquet and arrow files needs pyarrow: pip install 'sjd2-lightning[parquet]'"
        ) from error
    return pyarrow


@lru_cache(maxsize=64)
def _columns(path: str, changed: int) -> tuple[str, ...]:
    pyarrow = _pyarrow()
    try:
        if _is_parquet(path):
            return tuple(pyarrow.parquet.read_schema(path).names)
        return tuple(_arrow_table(path, changed).schema.names)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def _column(path: Path, columns: Sequence[str], asked: str | None, known: Sequence[str], option: str) -> str:
    found = [name for name in ((asked,) if asked else known) if name in columns]
    if not found:
        raise ValueError(f"{path} has the columns {', '.join(columns)}; say with {option} which it is")
    return str(found[0])


def _num_blocks(path: Path) -> int:
    return _pyarrow().parquet.ParquetFile(path).num_row_groups if _is_parquet(str(path)) else 1


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


@lru_cache(maxsize=4)
def _block(path: str, changed: int, block: int, column: str) -> Any:
    if not _is_parquet(path):
        return _arrow_table(path, changed)[column]
    file = _pyarrow().parquet.ParquetFile(path)
    return file.read_row_group(block, columns=[column], use_threads=False)[column]


@lru_cache(maxsize=4)
def _arrow_table(path: str, changed: int) -> Any:
    pyarrow = _pyarrow()
    return pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
