"""Whatever is damaged of a checkpoint: it is passed over for the sound one beside it, never a raw error."""

import io
import logging
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from torch.distributed.checkpoint import save

from sjd2_lightning.cli.train import resume_path
from sjd2_lightning.training.checkpoints import (
    VerifiedCheckpointIO,
    check_checkpoint,
    newest_sound_checkpoint,
    write_sums,
)

IO = VerifiedCheckpointIO()
WORDS = "(cannot be read|is damaged at|is not one of)"
STATE = {
    "state_dict": {"a": torch.arange(48.0), "b": torch.arange(7), "same": torch.arange(48.0) + 1},
    "global_step": 7,
    "note": "plain",
}


@pytest.fixture
def folder(tmp_path, caplog):
    """A sound checkpoint, and a newer one to damage."""
    caplog.set_level(logging.ERROR)
    for name in ("sound", "newer"):
        torch.save(STATE, tmp_path / f"{name}.ckpt")
    return tmp_path


def is_whole(found: dict) -> bool:
    """Whether a state is the one that was written."""
    weights, wanted = found["state_dict"], STATE["state_dict"]
    if weights.keys() != wanted.keys() or (found["global_step"], found["note"]) != (7, "plain"):
        return False
    return all(torch.equal(weights[name], wanted[name]) for name in wanted)


def is_refused(newer: Path, content: bytes) -> bool:
    """Whether the newer one is refused, in one sentence, with this content; if not, it loads as written."""
    newer.write_bytes(content)
    try:
        assert is_whole(IO.load_checkpoint(newer))
    except ValueError as error:
        found = str(error)
    else:
        return False
    return re.fullmatch(rf"checkpoint .*newer\.ckpt {WORDS}.+", found) is not None or pytest.fail(found)


def is_passed_over(folder: Path) -> bool:
    """Whether the sound one is taken, which is older."""
    os.utime(folder / "newer.ckpt", (2**31, 2**31))
    return newest_sound_checkpoint(folder) == folder / "sound.ckpt"


def check(folder: Path, content: bytes) -> bool:
    """Both of the above, which must agree."""
    refused = is_refused(folder / "newer.ckpt", content)
    assert is_passed_over(folder) == refused
    return refused


def structure(content: bytes) -> list[int]:
    """Positions of all but the weights: headers, names, sizes, sums, pickle, directory, end records."""
    weights = set()
    for tensor in STATE["state_dict"].values():
        start = content.index(tensor.numpy().tobytes())
        weights |= set(range(start, start + tensor.nbytes))
    return [position for position in range(len(content)) if position not in weights]


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_bits_of_the_structure(folder):
    content, rng = (folder / "newer.ckpt").read_bytes(), Random(0)
    newer = folder / "newer.ckpt"
    sample = rng.sample(structure(content), 500)
    seen = [is_refused(newer, flipped(content, at, rng.randrange(8))) for at in sample]
    assert sum(seen) > len(seen) // 4, "padding is the rest"


@pytest.mark.slow
def test_every_bit(folder):
    content = (folder / "newer.ckpt").read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            is_refused(folder / "newer.ckpt", flipped(content, position, bit))


DIRECTORY = struct.Struct("<4s6H3L5H2L")  # an entry of the central directory, without its name
# field: byte and bit of an entry; the last one makes torch alone read the member as a folder, empty
FIELDS = {
    "flags": (8, 0),
    "method": (10, 3),
    "sum": (16, 1),
    "size": (24, 2),
    "name": (28, 0),
    "folder": (38, 4),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_field_of_the_directory(folder, field, member):
    content = (folder / "newer.ckpt").read_bytes()
    entry = content.rindex(f"newer/{member}".encode()) - DIRECTORY.size
    assert content[entry : entry + 4] == b"PK\x01\x02"
    byte, bit = FIELDS[field]
    assert check(folder, flipped(content, entry + byte, bit))


def rewritten(content: bytes, change) -> bytes:
    """An archive whose members, pairs of name and content, are changed; its sums fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    change(members)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return target.getvalue()


def place(members: list[tuple[str, bytes]], end: str) -> int:
    return next(number for number, (name, _) in enumerate(members) if name.endswith(end))


def drop(end: str):
    return lambda members: members.pop(place(members, end))


def rename(end: str, new: str):
    def change(members):
        number = place(members, end)
        members[number] = (members[number][0].removesuffix(end) + new, members[number][1])

    return change


def duplicate(end: str):
    def change(members):
        name, data = members[place(members, end)]
        members.append((name, bytes(len(data))))

    return change


def compress(content: bytes) -> bytes:
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in archive.namelist():
            new.writestr(name, archive.read(name))
    return target.getvalue()


MEMBERS = {
    "weights dropped": drop("data/0"),
    "pickle dropped": drop("data.pkl"),
    "weights renamed": rename("data/1", "data/9"),
    "pickle renamed": rename("data.pkl", "data.pkk"),
    "weights twice": duplicate("data/0"),
    "pickle twice": duplicate("data.pkl"),
    "weights cut": lambda members: members.__setitem__(place(members, "data/0"), ("newer/data/0", b"short")),
    "all gone": lambda members: members.clear(),
    "of another tool": lambda members: members.__setitem__(slice(None), [("a.txt", b"text")]),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member(folder, name):
    content = (folder / "newer.ckpt").read_bytes()
    assert not check(folder, rewritten(content, lambda members: None))
    assert check(folder, rewritten(content, MEMBERS[name]))


def saved(value: object) -> bytes:
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


OTHERS = {
    "a tensor": lambda content: saved(torch.arange(3)),
    "a list": lambda content: saved([1, 2]),
    "weights alone": lambda content: saved(STATE["state_dict"]),
    "compressed": compress,
    "cut in the directory": lambda content: content[:-30],
    "cut in the weights": lambda content: content[: len(content) // 2],
    "a hole": lambda content: content[:200] + bytes(400) + content[600:],
    "something before": lambda content: b"x" + content,
    "empty": lambda content: b"",
    "a web page": lambda content: b"<html>not found</html>",
    "a pickle": lambda content: b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_content(folder, name):
    assert check(folder, OTHERS[name]((folder / "newer.ckpt").read_bytes()))


def test_random_damage(folder):
    content, rng = (folder / "newer.ckpt").read_bytes(), Random(1)
    for _ in range(200):
        changed = bytearray(content)
        start = rng.randrange(len(content))
        for position in range(start, min(len(content), start + rng.choice([1, 4, 64]))):
            changed[position] = rng.randrange(256)
        check(folder, bytes(changed))


@pytest.mark.parametrize(
    "kind", ["a link to nothing", "a link to itself", "an empty folder", "removed meanwhile"]
)
def test_what_is_no_file(folder, kind, monkeypatch):
    newer = folder / "newer.ckpt"
    newer.unlink()
    if kind == "a link to nothing":
        newer.symlink_to(folder / "gone")
    elif kind == "a link to itself":
        newer.symlink_to(newer)
    elif kind == "an empty folder":
        newer.mkdir()
        os.utime(newer, (2**31, 2**31))
    else:
        both = [newer, folder / "sound.ckpt"]
        monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(both))
    assert newest_sound_checkpoint(folder) == folder / "sound.ckpt"


def test_runs_beside_it(tmp_path):
    for age, name in enumerate(("sound", "damaged", "nothing")):
        place = tmp_path / name / "checkpoints" / "last.ckpt"
        place.parent.mkdir(parents=True)
        if name == "nothing":
            place.symlink_to(tmp_path / "gone")
        else:
            torch.save(STATE if name == "sound" else [1], place)
            os.utime(place, (1000 + age, 1000 + age))
    assert resume_path("last", tmp_path / "new") == tmp_path / "sound" / "checkpoints" / "last.ckpt"


@pytest.fixture
def sharded(folder):
    """A sharded checkpoint of one rank, newer than the sound file beside it."""
    place = folder / "newer.ckpt"
    place.unlink()
    weights = {name: value for name, value in STATE["state_dict"].items() if name != "same"}
    save({"state_dict": weights, "lr": 0.1}, checkpoint_id=place, no_dist=True)
    torch.save({"global_step": 7}, place / "meta.pt")
    write_sums(place)
    os.utime(place, (2**31, 2**31))
    assert newest_sound_checkpoint(folder) == place
    return place


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("with_sums", [True, False], ids=["ours", "as of 0.1.0"])
def test_a_bit_of_a_sharded_one(folder, sharded, with_sums):
    if not with_sums:
        (sharded / "sums.json").unlink()
    rng = Random(2)
    for file in sorted(path for path in sharded.iterdir()):
        content = file.read_bytes()
        for position in sorted(rng.sample(range(len(content)), min(len(content), 150))):
            file.write_bytes(flipped(content, position, rng.randrange(8)))
            found = is_passed_over(folder)  # raises nothing, whatever it finds
            assert found or not with_sums or file.suffix == ".distcp", (file.name, position)
        file.write_bytes(content)
    assert not is_passed_over(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["dropped", "renamed", "cut", "empty", "a folder"])
def test_a_part_of_a_sharded_one(folder, sharded, name, damage):
    part = sharded / name
    content = part.read_bytes()
    part.unlink()
    if damage == "renamed":
        (sharded / f"{name}.old").write_bytes(content)
    elif damage in ("cut", "empty"):
        part.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    elif damage == "a folder":
        part.mkdir()
    assert is_passed_over(folder)
    with pytest.raises(ValueError, match=rf"newer\.ckpt {WORDS}"):
        check_checkpoint(sharded)
    shutil.rmtree(sharded)
