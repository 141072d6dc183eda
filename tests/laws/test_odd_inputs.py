"""Every sample is kept, or counted and named: odd folders, tars and tables through the command."""

import json

import pytest

from sjd2_lightning.cli import prepare
from sjd2_lightning.data.reading import read_all
from tests.tools.odd_folders import FOLDERS, folder
from tests.tools.odd_inputs import APPLE, CAPTIONS
from tests.tools.odd_tables import COCO, TABLES
from tests.tools.odd_tars import TARS, sample, tar

SOURCES = {"folder": FOLDERS, "tars": TARS, "coco": COCO, "hf": TABLES}
CASES = {
    f"{source}: {name}": (source, case) for source, cases in SOURCES.items() for name, case in cases.items()
}


def run(capsys, *arguments) -> tuple[int, str]:
    """Exit code and last line of the command."""
    code = 0
    try:
        prepare.main([*map(str, arguments), "--image-size", "4", "--workers", "0"])
    except SystemExit as stopped:
        code = int(str(stopped.code))
    printed = capsys.readouterr()
    return code, (printed.err if code else printed.out).strip().splitlines()[-1]


def skipped_of(out) -> list[dict[str, str]]:
    """Lines of the lists of skipped samples."""
    return [json.loads(line) for path in out.rglob("skipped.jsonl") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_and_what_is_named(tmp_path, capsys, name):
    (source, case), out, place = CASES[name], tmp_path / "out", tmp_path / "in"
    case.write(place)
    options = ("--annotations", place / "captions.json") if source == "coco" else ()
    place = place / "val" if source == "coco" else place
    code, last_line = run(capsys, source, "--input", place, "--out", out, "--split", "train", *options)
    assert code == case.code, last_line
    skipped = skipped_of(out)
    found = [
        next((r for r in case.lost if entry["reason"].startswith(r)), entry["reason"]) for entry in skipped
    ]
    assert {reason: found.count(reason) for reason in found} == case.lost
    assert all(entry["file"] and entry["key"] for entry in skipped)
    assert "object at 0x" not in f"{last_line}{skipped}"
    if code:
        assert case.message in last_line
        return
    captions = sorted(sample.caption for sample in read_all(out / "raw" / "train"))
    assert captions == sorted(case.kept)
    total = len(case.kept) + sum(case.lost.values())
    assert last_line.startswith(f"kept {len(case.kept)} of {total} samples")


def test_the_share_is_of_all_splits_together(tmp_path, capsys):
    """One unusable picture of ten is a third of a split of three."""
    folder(tmp_path / "in")
    (tmp_path / "in" / "p0.txt").unlink()
    options = ("folder", "--input", tmp_path / "in", "--out", tmp_path / "out", "--val-share")
    for val_share in ("0.3", "0.7"):  # the picture is in one split or the other
        code, last_line = run(capsys, *options, val_share)
        assert (code, last_line.split(";")[0]) == (0, "kept 9 of 10 samples")
        assert [entry["file"] for entry in skipped_of(tmp_path / "out")] == ["p0.png"]
    prompts = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert {entry["prompt"] for entry in prompts} < set(CAPTIONS[1:])
    code, last_line = run(capsys, *options, "0.3", "--max-bad-share", "0.05")
    assert code == 1
    assert "1 of 10 samples cannot be used and 0 are allowed (1 x no caption" in last_line


def test_what_was_written_into_the_source_is_no_source(tmp_path, capsys):
    tar()(tmp_path)
    options = ("tars", "--input", tmp_path, "--out", tmp_path / "made", "--split", "train")
    for _ in range(2):
        assert run(capsys, *options) == (0, "kept 10 of 10 samples")


def test_a_repaired_source_leaves_no_list(tmp_path, capsys):
    tar(lambda n: [*sample(n)[:1], (f"{n:04d}.txt", APPLE)])(tmp_path / "in")
    options = ("tars", "--input", tmp_path / "in", "--out", tmp_path / "out", "--split", "train")
    code, last_line = run(capsys, *options)
    assert code == 1
    assert f"all are named in {tmp_path / 'out' / 'skipped.jsonl'}" in last_line
    assert len(skipped_of(tmp_path / "out")) == 10
    tar()(tmp_path / "in")
    assert run(capsys, *options) == (0, "kept 10 of 10 samples")
    assert skipped_of(tmp_path / "out") == []
