"""Damaged tars: what can be read is read, the rest is named, and nothing is read for ever."""

from random import Random

import pytest

from sjd2_lightning.data.sources.record import NothingUsableError, read_stretch
from sjd2_lightning.data.sources.tars import tar_parts, tar_records
from tests.tools.odd_inputs import CAPTIONS, picture
from tests.tools.odd_tars import sample, tar, tar_bytes

LONG = "d" * 90 + "/" + "e" * 90 + "{number}"


def names(path):
    lost = []
    return [part.name for part in tar_parts(path, lost)], lost


def test_two_tars_behind_each_other(tmp_path):
    one, other = (
        tar_bytes(member for number in part for member in sample(number)) for part in ((0, 1), (2,))
    )
    path = tmp_path / "a.tar"
    path.write_bytes(one + other)
    found, lost = names(path)
    assert found == [f"{number:04d}.{ending}" for number in range(3) for ending in ("jpg", "txt", "json")]
    assert not lost
    for record in tar_records(path):
        assert read_stretch(str(tmp_path), record) == picture(int(record.caption[-1]))


def test_a_damaged_header_costs_its_member(tmp_path):
    tar()(tmp_path)
    path = tmp_path / "00000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"0003.txt")] ^= 1
    path.write_bytes(content)
    found, lost = names(path)
    assert len(found) == 29
    assert "0003.txt" not in found
    assert [reason for _, reason in lost] == ["damaged; what lay here is lost"]
    kept = [record.caption for record in tar_records(path) if not record.problem]
    assert kept == list(CAPTIONS), "the json has the caption too"


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_is_read_past_or_named(tmp_path, seed):
    """Cuts, flips and holes at random places: no other error, no picture of another sample's caption."""
    rng = Random(seed)
    members = [member for number in range(6) for member in sample(number, LONG if number % 2 else "{number}")]
    whole = tar_bytes(members)
    path = tmp_path / "a.tar"
    unique = 0
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            stop = place + rng.choice((1, 8, 512, 3000))
            content[place:stop] = rng.choice((b"", b"\0", b"\xff")) * len(content[place:stop])
        path.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content) + 1)))])
        try:
            records = tar_records(path)
        except NothingUsableError as error:
            records = error.records
        usable = [record for record in records if not record.problem]
        assert records, "lost without a word"
        unique += len({record.key for record in usable}) == len(usable)
        for record in usable:
            number = record.member.rpartition("/")[2].lstrip("e").partition(".")[0]
            if record.caption.startswith("square ") and number.isdigit():
                assert record.caption == f"square {number}"
    assert unique == 60
