"""Names of files: which are passed over, which belong to one sample; for tars, folders and shards alike."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sjd2_lightning.data.captions import NO_CAPTION, caption_of_json, plain_caption
from sjd2_lightning.data.pictures import FORMATS, SUFFIXES, UNREAD

MAX_TEXT = 2**20  # bytes of a caption's file
NO_PICTURE = "no picture"
_PAPERS = {"readme", "license", "licence", "copying", "notice"}  # texts that are no captions


class Part(NamedTuple):
    """A file of a source.

    Args:
        name: name within the source.
        read: gives the content of a text; ValueError says why it cannot be used.
        start: place of the content in the file that holds it.
        num_bytes: size of the content.
        problem: why it cannot be used; "" if it can.
    """

    name: str
    read: Callable[[], bytes]
    start: int = 0
    num_bytes: int = 0
    problem: str = ""


Texts = dict[tuple[str, str], Part]  # by what stands before the last suffix, and by that suffix


class Captioned(NamedTuple):
    """A picture with its caption, or the part that would have been one and the reason why it is none."""

    part: Part
    caption: str
    problem: str = ""


def passed_over(name: str) -> bool:
    """Whether a file is no data: its name, or that of a folder above it, begins with a dot or is __MACOSX."""
    parts = name.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts)


def sample_name(name: str) -> tuple[str, str] | None:
    """Sample and suffix of a file by WebDataset's rule; None for a file that is passed over.

    The sample is the name up to the first dot of its last part, with its folder in front; "./" is nothing.
    """
    if passed_over(name):
        return None
    folder, slash, last = "/".join(part for part in name.split("/") if part != ".").rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix


def files_below(root: Path, but: Path | None = None) -> Iterator[str]:
    """Names of all files below a folder that are not passed over, in order; links to folders are followed.

    Args:
        root: the folder.
        but: folder whose files are left out.

    Raises:
        ValueError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); make it readable")

    seen = {os.path.realpath(but)} if but else set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not passed_over(name))
        inner = Path(folder).relative_to(root)
        yield from ((inner / name).as_posix() for name in sorted(names) if not passed_over(name))


def text_parts(root: Path, names: Iterable[str]) -> Iterator[Part]:
    """Files of a folder as parts."""

    def reader(path: Path) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                check_regular(path)
                check_text(path.stat().st_size)
                return path.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot be read ({error.strerror})") from None

        return read

    return (Part(name, reader(root / name)) for name in names)


def check_regular(path: Path) -> None:
    """Refuses pipes and devices, which would be read for ever; OSError if there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no regular file")


def check_text(num_bytes: int) -> None:
    """Refuses a file that is too large for a caption."""
    if num_bytes > MAX_TEXT:
        raise ValueError(f"a caption of {num_bytes} bytes, {MAX_TEXT} are the most")


def captioned(parts: Iterable[Part], fields: bool) -> Iterator[Captioned]:
    """Every picture among some parts with the caption in the .txt or .json of its name, or why it has none.

    Suffixes may be in capitals. Pictures of one name share its caption. A caption without a picture is named
    too. Of two parts of one name the later counts, as in a tar that was appended to.

    Args:
        parts: the files of a source.
        fields: whether `k.seg.png` is a further field of the sample `k`, if that has a picture `k.png`.
    """
    samples: dict[str, dict[str, Part]] = {}
    for part in parts:
        if (named := sample_name(part.name)) is None:
            continue
        # macOS writes letters with marks in another form than what names them elsewhere
        files = samples.setdefault(unicodedata.normalize("NFC", named[0]), {})
        if (older := files.pop(named[1], None)) and _ending(named[1])[1] in (*SUFFIXES, *UNREAD):
            yield Captioned(older, "", "a later file has the same name; that one counts")
        files[named[1]] = part
    for name, files in samples.items():
        yield from _of_sample(name, files, fields)


def sample_texts(files: dict[str, Part]) -> Texts:
    """Texts of a sample by what stands between its name and the last suffix, and by that suffix."""
    found = {_ending(suffix): part for suffix, part in files.items()}
    return {ending: part for ending, part in found.items() if ending[1] in (".txt", ".json")}


def _of_sample(name: str, files: dict[str, Part], fields: bool) -> Iterator[Captioned]:
    texts = sample_texts(files)
    pictures = [
        (*_ending(suffix), part)
        for suffix, part in files.items()
        if _ending(suffix)[1] in (*SUFFIXES, *UNREAD)
    ]
    owners = {middle for middle, _ in texts}
    has_plain = fields and "" in owners and any(not middle for middle, _, _ in pictures)
    for middle, suffix, part in pictures:
        if middle not in owners and middle and has_plain:
            continue
        try:
            if part.problem:
                raise ValueError(part.problem)
            if suffix in UNREAD:
                raise ValueError(f"format not read ({suffix}); convert it to {' or '.join(FORMATS[:2])}")
            if middle not in owners:
                others = [f".{other}" for other in files if files[other] is not part]
                raise ValueError(NO_CAPTION + (f" (beside it lie {', '.join(others[:4])})" if others else ""))
            yield Captioned(part, sample_caption(texts, middle))
        except ValueError as error:
            yield Captioned(part, "", str(error))
    for middle in sorted(owners) if not pictures and name.rpartition("/")[2].lower() not in _PAPERS else ():
        part = texts.get((middle, ".txt")) or texts[middle, ".json"]
        try:
            sample_caption(texts, middle)
        except ValueError:
            continue  # neither picture nor caption: something else
        endings = ", ".join(f".{suffix}" for suffix in list(files)[:4])
        yield Captioned(part, "", f"{NO_PICTURE} (the files of this name are {endings})")


def sample_caption(texts: Texts, middle: str) -> str:
    """The caption in a sample's .txt, else in its .json."""
    text, fields = texts.get((middle, ".txt")), texts.get((middle, ".json"))
    try:
        return plain_caption(text.read() if text else None)
    except ValueError as error:
        if fields is None or str(error) != NO_CAPTION:
            raise
    return caption_of_json(fields.read())


def _ending(suffix: str) -> tuple[str, str]:
    """What stands before the last dot of a suffix, and the last part in small letters with its dot."""
    middle, _, last = suffix.rpartition(".")
    return middle, f".{last.lower()}"


def shown(names: Sequence[str], most: int = 3) -> str:
    """Some names for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
