"""Pictures in a folder, with captions beside them or in a metadata file (Hugging Face's `imagefolder`)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sjd2_lightning.data.captions import CAPTION_FIELDS, NO_CAPTION, caption_in
from sjd2_lightning.data.names import captioned, files_below, text_parts
from sjd2_lightning.data.sources.record import Record, checked_records, file_record, inside, key_of
from sjd2_lightning.run.files import text_of

METADATA = ("metadata.jsonl", "metadata.csv")
_REMEDY = "put <name>.txt beside <name>.jpg, or a metadata.jsonl with file_name and caption into the folder"


def folder_records(root: Path) -> list[Record]:
    """Pictures of a folder and its sub-folders.

    Captions come from ``metadata.jsonl`` or ``metadata.csv`` in the folder or a sub-folder (`file_name` and
    one of `caption`, `text`, `prompt`), else from the ``.txt`` (or ``.json``) beside each picture.

    Raises:
        ValueError: there are no pictures with captions, or metadata names a file outside the folder.
    """
    return checked_records(listed_pictures(root), root, _REMEDY)


def listed_pictures(root: Path) -> list[Record]:
    """Every picture of a folder, with its caption or with what is wrong; ValueError if it is no folder."""
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give --input a folder of pictures")
    names = list(files_below(root))
    tables = [name for name in names if PurePosixPath(name).name.lower() in METADATA]
    records = [record for table in tables for record in _rows(root, table)]
    in_tables = {record.file for record in records}
    hint = f" (no row in {tables[0]})" if tables else ""
    for part, caption, problem in captioned(text_parts(root, names), fields=False):
        if part.name not in in_tables:
            reason = problem + hint if problem == NO_CAPTION else problem
            records.append(file_record(root, part.name, key_of(part.name), caption, reason))
    return records


def _rows(root: Path, table: str) -> Iterator[Record]:
    """Records of a metadata file; a row that cannot be used is one with its problem."""
    content, folder = (root / table).read_bytes(), PurePosixPath(table).parent
    # every row is judged by itself: bytes that are not UTF-8 stay recognisable until then
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    rows = _csv_rows if table.lower().endswith(".csv") else _json_rows
    for number, fields, problem in rows(text, root / table):
        name = caption = ""
        try:
            name = _file_name(root, folder, fields) if fields else ""
            caption = "" if problem else caption_in(fields)
        except ValueError as error:
            problem = str(error)
        if name:
            inside(root, name)  # whatever else is wrong with the row
            yield file_record(root, name, key_of(name), caption, problem)
        else:
            line = f"line {number}"
            yield Record(key_of(f"{table}/{line} "), "", table, number, 0, member=line, problem=problem)


def _file_name(root: Path, folder: PurePosixPath, fields: dict[str, Any]) -> str:
    """The picture of a row, named from the root; what Windows wrote has backslashes."""
    name = fields.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError("the row has no file_name; it names the picture within the folder")
    if "\\" in name and not (root / folder / name).is_file():
        name = name.replace("\\", "/")
    return (folder / name).as_posix()


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line, fields and problem of every row; ValueError if the header names no pictures or captions."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(rows.fieldnames or ())
        text_of("".join(columns).encode("utf-8", "surrogateescape"))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: its header cannot be read ({error})") from None
    if "file_name" not in columns or not set(CAPTION_FIELDS) & set(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(map(repr, columns))}; it needs file_name and one of caption, "
            "text, prompt, with commas between them"
        )
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, {}, f"the row cannot be read ({error}); correct its quotes"
        else:
            many = None in row  # where the reader keeps fields beyond the header
            problem = "row has more fields than the header; put texts with commas into quotes" if many else ""
            yield rows.line_num, row, problem


def _json_rows(text: str, _: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line, fields and problem of every line of JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields, problem = json.loads(line), ""
            except (ValueError, RecursionError) as error:
                fields, problem = {}, f"line {number} is no JSON ({error})"
            if not isinstance(fields, dict):
                fields, problem = {}, f"line {number} is no JSON object"
            if not fields and not problem:
                problem = "the row has no file_name; it names the picture within the folder"
            yield number, fields, problem
