"""Odd tars of captioned pictures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.tools.odd_inputs import APPLE, CAPTIONS, NINE, NUM, Case, picture, refused

Member = tuple[str, bytes]


def sample(
    number: int, name: str = "{number:04d}", endings: Iterable[str] = ("jpg", "txt", "json")
) -> list[Member]:
    """Files of a sample as img2dataset writes them."""
    key, caption = name.format(number=number), f"square {number}"
    content = {"txt": caption.encode(), "json": json.dumps({"caption": caption, "key": key}).encode()}
    return [(f"{key}.{ending}", content.get(ending.lower(), picture(number))) for ending in endings]


def tar_bytes(members: Iterable[Member], mode: str = "w", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar(
    of: Callable[[int], list[Member]] = sample,
    change: Callable[[bytes], bytes] = bytes,
    name: str = "00000.tar",
    beside: dict[str, bytes] | None = None,
    more: Iterable[Member] = (),
    **options: Any,
) -> Callable[[Path], None]:
    """A folder with a tar of ten samples."""

    def write(root: Path) -> None:
        members = [member for number in range(NUM) for member in of(number)] + list(more)
        for place, content in ({name: change(tar_bytes(members, **options))} | (beside or {})).items():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_bytes(content)

    return write


def with_links(root: Path) -> None:
    """The first picture of a tar is a link."""
    tar(lambda n: sample(n) if n else sample(n)[1:])(root)
    with tarfile.open(root / "00000.tar", "a") as archive:
        link = tarfile.TarInfo("0000.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def flipped(content: bytes) -> bytes:
    """Damage in the header of the second sample's picture."""
    place = content.index(b"0001.jpg")
    return content[:place] + b"X" + content[place + 1 :]


def half(number: int, spare: Callable[[int], list[Member]]) -> list[Member]:
    return sample(number) if number % 2 else spare(number)


HALF = {"no caption": 5}
TARS = {
    "plain": Case(tar()),
    "dot and slash": Case(tar(lambda n: sample(n, "./{number:04d}"))),
    "a folder in front": Case(tar(lambda n: sample(n, "part-0/{number:04d}"))),
    "capital suffixes": Case(tar(lambda n: sample(n, endings=("JPG", "TXT", "JSON")))),
    "capital pictures": Case(tar(lambda n: sample(n, endings=("JPEG", "txt", "json")))),
    "no text": Case(tar(lambda n: sample(n, endings=("jpg", "json")))),
    "no json": Case(tar(lambda n: sample(n, endings=("jpg", "txt")))),
    "dotted names": Case(tar(lambda n: sample(n, "cat.{number}"))),
    "half without caption": Case(tar(lambda n: half(n, lambda n: sample(n)[:1])), (), HALF, 1, "5 of 10"),
    "half with null": Case(
        tar(
            lambda n: half(
                n, lambda n: [*sample(n)[:1], (f"{n:04d}.txt", b""), (f"{n:04d}.json", b'{"caption": null}')]
            )
        ),
        (),
        HALF,
        1,
        "5 x no caption",
    ),
    "half without field": Case(
        tar(lambda n: half(n, lambda n: [*sample(n)[:1], (f"{n:04d}.json", b'{"url": "u"}')])),
        (),
        HALF,
        1,
        "5 x",
    ),
    "one json that is none": Case(
        tar(lambda n: sample(n) if n else [*sample(n)[:1], ("0000.json", b"{")]), NINE, {"no JSON": 1}
    ),
    "one without picture": Case(tar(lambda n: sample(n) if n else sample(n)[1:]), NINE, {"no picture": 1}),
    "list of captions": Case(
        tar(
            lambda n: [
                *sample(n)[:1],
                (f"{n:04d}.json", json.dumps({"caption": [f"square {n}", "b"]}).encode()),
            ]
        )
    ),
    "input and output": refused(
        tar(lambda n: [(f"{n}.input.jpg", picture(n)), (f"{n}.output.txt", b"red")]),
        "beside it lie .output.txt",
        "no caption",
    ),
    "a mask beside": Case(tar(lambda n: [*sample(n), (f"{n:04d}.seg.png", picture(n))])),
    "two pictures of a name": Case(
        tar(lambda n: sample(n, endings=("jpg", "png", "txt"))), tuple(sorted(CAPTIONS * 2))
    ),
    "AppleDouble": Case(tar(lambda n: [(f"._{name}", APPLE) for name, _ in sample(n)] + sample(n))),
    "AppleDouble behind dot and slash": Case(
        tar(lambda n: [(f"./._{name}", APPLE) for name, _ in sample(n)] + sample(n, "./{number:04d}"))
    ),
    "macOS archive": Case(tar(lambda n: [(f"__MACOSX/{name}", APPLE) for name, _ in sample(n)] + sample(n))),
    "appended to": Case(
        tar(more=[("0000.jpg", picture(0)), ("0000.txt", b"second")]),
        (*NINE[:0], "second", *NINE),
        {"a later file has the same name": 1},
    ),
    "names of other letters": Case(tar(lambda n: sample(n, "красный_{number}"))),
    "long names": Case(
        tar(lambda n: sample(n, "d" * 90 + "/" + "e" * 90 + "{number}"), format=tarfile.GNU_FORMAT)
    ),
    "latin-1": refused(
        tar(lambda n: [*sample(n)[:1], (f"{n:04d}.txt", b"carr\xe9")]), "not UTF-8", "not UTF-8"
    ),
    "byte-order mark": Case(tar(lambda n: [*sample(n)[:1], (f"{n:04d}.txt", b"\xef\xbb\xbfsquare %d" % n)])),
    "several lines": Case(tar(lambda n: [*sample(n)[:1], (f"{n:04d}.txt", b"square\r\n %d\n" % n)])),
    "compressed": refused(
        tar(mode="w:gz", name="00000.tar.gz"), "give an uncompressed one", "cannot be read as a tar", 1
    ),
    "compressed, called a tar": refused(tar(mode="w:gz"), "it is compressed", "cannot be read as a tar", 1),
    "tgz": refused(tar(mode="w:xz", name="a.tgz"), "it is compressed", "cannot be read as a tar", 1),
    "other files": refused(tar(name="00000.zip"), "has no .tar files; there are 1 x .zip"),
    "nested": Case(tar(name="a/b/00000.TAR")),
    "an empty one beside": Case(
        tar(beside={"00001.tar": b""}), CAPTIONS, {"cannot be read as a tar (an empty": 1}
    ),
    "a web page beside": Case(
        tar(beside={"00001.tar": b"<html>" * 200}), CAPTIONS, {"cannot be read as a tar": 1}
    ),
    "one without samples beside": Case(tar(beside={"00001.tar": tar_bytes([])})),
    "companions": Case(tar(beside={"00000.parquet": b"x", "00000_stats.json": b"{}", "._00000.tar": APPLE})),
    "cut at the end": Case(
        tar(change=lambda content: content.rstrip(b"\0") + b"\0"), CAPTIONS, {"ends early": 1}
    ),
    "cut in the last picture": Case(
        tar(lambda n: sample(n)[::-1], lambda content: content[: content.rindex(b"IHDR") + 30]),
        CAPTIONS[:-1],
        {"ends early": 2},
        1,
        "2 samples cannot be used",
    )._replace(kept=()),
    "two behind each other": Case(
        tar(of=lambda n: sample(n), change=lambda content: tar_bytes([]) + content)
    ),
    "a damaged header": Case(
        tar(lambda n: sample(n) * 1, flipped), (), {"damaged": 1, "no picture": 1}, 1, "2 of 11"
    ),
    "a link": Case(with_links, NINE, {"no regular file": 1}),
}
