"""Odd folders of captioned pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tools.odd_inputs import APPLE, CAPTIONS, NINE, NUM, Case, picture, refused


def folder(root: Path, text: str | None = "{stem}.txt", name: str = "p{number}.png") -> Path:
    """Pictures with texts beside them."""
    for number in range(NUM):
        path = root / name.format(number=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        if text is not None:
            beside = text.format(stem=path.stem, name=path.name)
            (path.parent / beside).write_text(f"square {number}\n", encoding="utf-8")
    return root


def texts(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Changes every text of a folder."""

    def write(root: Path) -> None:
        for path in sorted(folder(root).rglob("*.txt")):
            change(path)

    return write


def copies(place: str, of: str = "*", content: bytes | None = None) -> Callable[[Path], None]:
    """A copy of every file, or other content under its name, in another place of the folder."""

    def write(root: Path) -> None:
        for path in sorted(folder(root).glob(of)):
            copy = root / place.format(name=path.name, stem=path.stem, suffix=path.suffix)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes() if content is None else content)

    return write


def rows(
    line: Callable[[int], str | bytes],
    kind: str = "jsonl",
    head: str = "",
    mark: bytes = b"",
    place: str = "",
) -> Callable[[Path], None]:
    """A folder whose captions stand in a metadata file."""

    def write(root: Path) -> None:
        folder(root / place, None)
        lines = [head, *map(line, range(NUM))] if head else list(map(line, range(NUM)))
        content = b"\n".join(text if isinstance(text, bytes) else text.encode() for text in lines)
        (root / place / f"metadata.{kind}").write_bytes(mark + content + b"\n")

    return write


def row(number: int, **changes: Any) -> str:
    return json.dumps({"file_name": f"p{number}.png", "text": f"square {number}"} | changes)


def unlink(*names: str) -> Callable[[Path], None]:
    """A folder that lacks some files."""

    def write(root: Path) -> None:
        folder(root)
        for name in names:
            (root / name).unlink()

    return write


def other_format(suffix: str, kind: str) -> Callable[[Path], None]:
    """The first picture under another suffix."""

    def write(root: Path) -> None:
        (folder(root) / "p0.png").unlink()
        (root / f"p0{suffix}").write_bytes(picture(0, kind))

    return write


def linked(root: Path) -> None:
    """Half of the pictures lie behind a link, and another link leads round in a circle."""
    folder(root.parent / "elsewhere", name="p{number}.png")
    root.mkdir()
    (root / "link").symlink_to(root.parent / "elsewhere")
    (root / "circle").symlink_to(root)
    (root / "broken.png").symlink_to(root / "gone.png")
    (root / "broken.txt").write_text("gone")


def devices(root: Path) -> None:
    """A picture and a text that never end, and a text that never begins."""
    folder(root)
    for name in ("p0.png", "p1.txt", "p2.txt"):
        (root / name).unlink()
    (root / "p0.png").symlink_to("/dev/zero")
    (root / "p1.txt").symlink_to("/dev/zero")
    os.mkfifo(root / "p2.txt")


def beside(*names: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        folder(root)
        for name in names:
            (root / name).write_text("a text that is no caption")

    return write


def twins(root: Path) -> None:
    """Two pictures of one name and one caption."""
    (folder(root) / "p0.jpg").write_bytes(picture(0, "JPEG"))


FOLDERS = {
    "plain": Case(folder),
    "byte-order mark": Case(texts(lambda p: p.write_bytes(b"\xef\xbb\xbf" + p.read_bytes()))),
    "several lines": Case(texts(lambda p: p.write_bytes(p.read_bytes().replace(b" ", b"\r\n\r\n \t")))),
    "utf-16": refused(
        texts(lambda p: p.write_text(p.read_text(), encoding="utf-16")), "not UTF-8", "not UTF-8"
    ),
    "utf-16 without a mark": refused(
        texts(lambda p: p.write_text(p.read_text(), encoding="utf-16-le")), "not UTF-8", "not UTF-8"
    ),
    "gbk": refused(texts(lambda p: p.write_bytes("方块".encode("gbk"))), "save it as UTF-8", "not UTF-8"),
    "one in latin-1": Case(
        texts(lambda p: p.name == "p0.txt" and p.write_bytes("carré".encode("latin-1"))),
        NINE,
        {"not UTF-8": 1},
    ),
    "html and control characters": Case(
        texts(lambda p: p.write_text(f"<s>a</s>\x07 b\u200bc {p.stem}")),
        tuple(f"<s>a</s>\x07 b\u200bc p{number}" for number in range(NUM)),
    ),
    "very long": Case(texts(lambda p: p.write_text("word " * 6000)), ("word " * 5999 + "word",) * NUM),
    "too long": refused(
        texts(lambda p: p.write_text("word " * 300_000)), "1048576 are the most", "a caption of"
    ),
    "invisible": refused(texts(lambda p: p.write_text("\ufeff\u200b \n\x00")), "no caption", "no caption"),
    "capital suffixes": Case(lambda root: folder(root, "{stem}.TXT", "p{number}.PNG")),
    "two suffixes": refused(
        lambda root: folder(root, "{name}.txt") and None, "beside it lie .png.txt", "no caption"
    ),
    "other texts": refused(
        lambda root: folder(root, "{stem}.caption") and None, "beside it lie .caption", "no caption"
    ),
    "no text at all": refused(
        lambda root: folder(root, None) and None, "put <name>.txt beside <name>.jpg", "no caption"
    ),
    "dotted names": Case(lambda root: folder(root, name="cat.{number}.v2.png")),
    "one dotted name without text": Case(
        lambda root: folder(root, name="cat.{number}.png") and (root / "cat.0.txt").unlink(),
        NINE,
        {"no caption": 1},
    ),
    "names of other letters": Case(lambda root: folder(root, name="блюдо {number}.png")),
    "names of no letters": Case(lambda root: folder(root, name="-_ü{number}é.png")),
    "nested": Case(lambda root: folder(root, name="d{number}/sub.folder/p.png")),
    "json beside": Case(
        texts(lambda p: p.rename(p.with_suffix(".json")).write_text(f'{{"caption": "square {p.stem[1:]}"}}'))
    ),
    "one without text": Case(unlink("p0.txt"), NINE, {"no caption": 1}),
    "half without text": Case(
        unlink(*(f"p{number}.txt" for number in range(0, NUM, 2))),
        (),
        {"no caption": 5},
        1,
        "5 of 10 samples cannot",
    ),
    "one without picture": Case(unlink("p0.png"), NINE, {"no picture": 1}),
    "AppleDouble": Case(copies("._{name}", content=APPLE)),
    "macOS archive": Case(copies("__MACOSX/._{name}", content=APPLE)),
    "macOS archive, plain names": Case(copies("__MACOSX/{name}")),
    "copies of Jupyter": Case(copies(".ipynb_checkpoints/{stem}-checkpoint{suffix}")),
    "hidden folder of pictures": Case(copies(".thumbnails/more/{name}")),
    "case twins": Case(copies("P{name}", "p0.*"), (*CAPTIONS[:1], *CAPTIONS)),
    "twins of two formats": Case(twins, (*CAPTIONS[:1], *CAPTIONS)),
    "links": Case(linked, CAPTIONS, {"cannot be read (No such file": 1}),
    "devices": Case(devices, (), {"no regular file": 3}, 1, "3 of 10 samples"),
    "all broken": refused(
        copies("{name}", "p*.png", b"<p>"), "10 samples cannot be used and 1 are allowed", "format not read"
    ),
    "papers beside": Case(beside("README.txt", "LICENSE.txt", "list.csv", "Thumbs.db")),
    "jfif": Case(other_format(".jfif", "JPEG")),
    "tiff": Case(other_format(".tif", "TIFF"), NINE, {"format not read (.tif)": 1}),
    "heic": Case(other_format(".HEIC", "PNG"), NINE, {"format not read (.heic)": 1}),
    "tiff in png's clothes": Case(other_format(".png", "TIFF"), NINE, {"format not read: no picture": 1}),
    "web page": Case(
        copies("{name}", "p0.png", b"<!DOCTYPE html><p>403"), NINE, {"format not read: no picture": 1}
    ),
    "empty picture": Case(copies("{name}", "p0.png", b""), NINE, {"an empty file": 1}),
    "cut picture": Case(copies("{name}", "p0.png", picture()[:50]), NINE, {"no picture in one of": 1}),
    "rows": Case(rows(row)),
    "rows in a sub-folder": Case(rows(row, place="train")),
    "rows with a mark": Case(rows(row, mark=b"\xef\xbb\xbf")),
    "rows with lists": Case(rows(lambda n: row(n, text=["", f"square {n}", "x"]))),
    "rows with breaks": Case(rows(lambda n: row(n, text=f" square\r\n{n}\n"))),
    "rows of Windows": Case(
        lambda root: (
            rows(lambda n: row(n, file_name=f"sub\\p{n}.png"))(root),
            (root / "sub").mkdir(),
            [path.rename(root / "sub" / path.name) for path in root.glob("*.png")],
        )
    ),
    "a row with null": Case(
        rows(lambda n: row(n, text=None if n == 0 else f"square {n}")), NINE, {"no caption": 1}
    ),
    "a row with half a character": Case(
        rows(lambda n: row(n, text="\ud800 red" if n == 0 else f"square {n}")), NINE, {"not UTF-8": 1}
    ),
    "a row in latin-1": Case(
        rows(lambda n: row(n).encode() if n else b'{"file_name": "p0.png", "text": "carr\xe9"}'),
        NINE,
        {"not UTF-8": 1},
    ),
    "a row of a file that is not there": Case(
        rows(lambda n: row(n) + ("\n" + row(99) if n == 0 else "")),
        CAPTIONS,
        {"cannot be read (No such file": 1},
    ),
    "a picture without row": Case(
        rows(lambda n: row(n) if n else ""), NINE, {"no caption (no row in metadata.jsonl)": 1}
    ),
    "rows of another field": refused(
        rows(lambda n: json.dumps({"image": f"p{n}.png", "text": "x"})), "no file_name"
    )._replace(lost={"the row has no file_name": NUM, "no caption (no row": NUM}),
    "a row that is no JSON": Case(
        rows(lambda n: row(n) + ("\n{" if n == 0 else "")), CAPTIONS, {"line 2 is no JSON": 1}
    ),
    "table": Case(rows(lambda n: f'p{n}.png,"square {n}"', "csv", "file_name,text")),
    "table with a mark": Case(
        rows(lambda n: f"p{n}.png,square {n}", "csv", "file_name,text", b"\xef\xbb\xbf")
    ),
    "table with semicolons": refused(
        rows(lambda n: f"p{n}.png;square {n}", "csv", "file_name;text"), "has the columns 'file_name;text'"
    ),
    "table in utf-16": refused(
        rows(lambda n: "x", "csv", "file_name,text", "file_name,text\n".encode("utf-16")), "not UTF-8"
    ),
    "table with loose commas": refused(
        rows(lambda n: f"p{n}.png,a square, blue", "csv", "file_name,text"),
        "more fields than",
        "row has more fields",
    ),
    "table with one loose comma": Case(
        rows(lambda n: f"p{n}.png,square {n}" + ", blue" * (n == 0), "csv", "file_name,text"),
        NINE,
        {"row has more fields than the header": 1},
    ),
    "table with a short row": Case(
        rows(lambda n: f"p{n}.png,square {n}" if n else "p0.png", "csv", "file_name,text"),
        NINE,
        {"no caption": 1},
    ),
    "table with a loose quote": Case(
        rows(lambda n: f"p{n}.png,square {n}" if n else 'p0.png,"blue" square', "csv", "file_name,text"),
        NINE,
        {"the row cannot be read": 1, "no caption (no row": 1},
    )._replace(code=1, kept=(), message="2 of 11 samples cannot be used and 1 are allowed"),
    "table in latin-1": refused(
        rows(lambda n: f"p{n}.png,carré {n}".encode("latin-1"), "csv", "file_name,text"),
        "not UTF-8",
        "not UTF-8",
    ),
}
