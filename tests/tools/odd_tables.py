"""Odd annotations of COCO and odd tables of Hugging Face's data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.tools.odd_inputs import CAPTIONS, NINE, NUM, Case, picture, refused

Content = dict[str, Any]


def coco(change: Callable[[Content], object] = dict) -> Callable[[Path], None]:
    """Pictures in val/ and captions.json, whose content is changed."""

    def write(root: Path) -> None:
        (root / "val").mkdir(parents=True)
        for number in range(NUM):
            (root / "val" / f"{number:012d}.jpg").write_bytes(picture(number, "JPEG"))
        images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(NUM)]
        notes = [
            {"id": 10 * number + later, "image_id": number, "caption": f"{'later ' * later}square {number}"}
            for later in (1, 0)
            for number in range(NUM)
        ]
        content = {"images": images, "annotations": notes}
        change(content)
        (root / "captions.json").write_text(json.dumps(content), encoding="utf-8")

    return write


def each(part: str, **changes: Callable[[Any], Any]) -> Callable[[Content], object]:
    """Changes fields of every image or annotation; a field that becomes None is taken away."""

    def change(content: Content) -> None:
        for entry in content[part]:
            for name, new in changes.items():
                entry[name] = new(entry[name])
                if entry[name] is None:
                    del entry[name]

    return change


def first_captions(value: Any, *numbers: int) -> Callable[[Content], object]:
    """Captions of the first annotation of some images."""
    return lambda content: [content["annotations"][NUM + number].update(caption=value) for number in numbers]


def with_mark(root: Path) -> None:
    coco()(root)
    path = root / "captions.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def in_latin(root: Path) -> None:
    coco()(root)
    path = root / "captions.json"
    path.write_bytes(path.read_bytes().replace(b"square", b"carr\xe9"))


NO_COCO = "cannot be read as COCO captions"
COCO = {
    "plain": Case(coco()),
    "byte-order mark": Case(with_mark),
    "latin-1": refused(in_latin, "not UTF-8"),
    "images were cut": Case(coco(lambda c: c.update(images=c["images"][:6])), CAPTIONS[:6]),
    "an image twice": Case(coco(lambda c: c["images"].append(c["images"][0]))),
    "a file with two ids": Case(
        coco(
            lambda c: (
                c["images"].append({"id": 77, "file_name": f"{0:012d}.jpg"}),
                c["annotations"].append({"id": 1, "image_id": 77, "caption": "square 0"}),
            )
        ),
        (CAPTIONS[0], *CAPTIONS),
    ),
    "an id with two files": refused(
        coco(lambda c: c["images"].append({"id": 3, "file_name": "x.jpg"})), "gives the id 3 to"
    ),
    "null, then a caption": Case(coco(first_captions(None, 0)), tuple(sorted(("later square 0", *NINE)))),
    "null alone": Case(
        coco(
            lambda c: c.update(
                annotations=[n | ({"caption": None} if n["image_id"] == 0 else {}) for n in c["annotations"]]
            )
        ),
        NINE,
        {"no caption": 1},
    ),
    "no annotation": Case(
        coco(lambda c: c.update(annotations=[n for n in c["annotations"] if n["image_id"]])),
        NINE,
        {"no caption": 1},
    ),
    "several lines": Case(coco(each("annotations", caption=lambda text: text.replace(" ", "\r\n ")))),
    "ids that are texts": Case(
        coco(lambda c: (each("images", id=str)(c), each("annotations", image_id=str)(c)))
    ),
    "ids that are words": refused(
        coco(each("images", id=lambda number: f"im_{number}")), "id 'im_0' is no number"
    ),
    "ids with fractions": refused(
        coco(each("images", id=lambda number: number + 0.5)), "id 0.5 is no number"
    ),
    "no ids of annotations": Case(
        coco(each("annotations", id=lambda _: None)), tuple(f"later {caption}" for caption in CAPTIONS)
    ),
    "a file that is not there": Case(
        coco(lambda c: c["images"][0].update(file_name="999.jpg")), NINE, {"cannot be read (No such file": 1}
    ),
    "another archive": refused(
        coco(each("images", file_name=lambda name: f"COCO_val2014_{name}")),
        "give the folder",
        "cannot be read (No such",
    ),
    "names with folders": refused(
        coco(each("images", file_name=lambda name: f"val/{name}")), "names of COCO hold no folders"
    ),
    "boxes": refused(coco(each("annotations", caption=lambda _: None)), NO_COCO),
    "no annotations": refused(coco(lambda c: c.update(annotations=[])), "has no pictures with", "no caption"),
    "Karpathy's split": refused(coco(lambda c: c.pop("annotations")), NO_COCO),
}


def table(
    texts: Sequence[Any] = CAPTIONS,
    beside: dict[str, bytes] | None = None,
    as_bytes: bool = False,
    **images: Any,
) -> Callable[[Path], None]:
    """A parquet file; images by row in place of the plain ones."""

    def write(root: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        root.mkdir()
        pictures = [{"bytes": picture(number), "path": None} for number in range(NUM)]
        for name, image in images.items():
            pictures[int(name[1:])] = image
        column = pa.array(texts, pa.binary()).view(pa.string()) if as_bytes else pa.array(texts)
        pq.write_table(pa.table({"image": pictures, "text": column}), root / "a.parquet", row_group_size=4)
        for name, content in (beside or {}).items():
            (root / name).write_bytes(content)

    return write


TABLES = {
    "plain": Case(table()),
    "one null": Case(table([None, *NINE]), NINE, {"no caption": 1}),
    "half null": Case(table([None, "a"] * 5), (), {"no caption": 5}, 1, "5 of 10 samples"),
    "lists": Case(table([[caption, "x"] for caption in CAPTIONS])),
    "an empty list": Case(table([[], *([caption] for caption in NINE)]), NINE, {"no caption": 1}),
    "several lines": Case(table([caption.replace(" ", "\n ") for caption in CAPTIONS])),
    "one in latin-1": Case(
        table([b"carr\xe9", *(caption.encode() for caption in NINE)], as_bytes=True), NINE, {"not UTF-8": 1}
    ),
    "no picture": Case(table(_0=None), NINE, {"column image of a.parquet holds no picture": 1}),
    "a path to nowhere": Case(
        table(_0={"bytes": None, "path": "b.png"}), NINE, {"its path 'b.png' is no file": 1}
    ),
    "a path that leads out": Case(
        table(_0={"bytes": None, "path": "../b.png"}), NINE, {"'../b.png' leads out": 1}
    ),
    "a broken one beside": Case(table(beside={"b.parquet": b"PAR1"}), CAPTIONS, {"": 1}),
    "companions": Case(table(beside={"._a.parquet": b"\0\5", "README.md": b"x"})),
}
