"""From captioned pictures as people have them to shards."""

from __future__ import annotations

import io
import itertools
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sjd2_lightning.cli import prepare
from sjd2_lightning.data.index import KEY, ShardIndex
from sjd2_lightning.data.pictures import CROPPED
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.data.sources import parquet as hf_source
from sjd2_lightning.data.sources.coco import coco_records
from sjd2_lightning.data.sources.folder import folder_records
from sjd2_lightning.data.sources.parquet import block_of, read_cell, table_records
from sjd2_lightning.data.sources.record import Record, chosen_records, key_of, read_stretch, share_of_fewest
from sjd2_lightning.data.sources.tars import tar_records
from sjd2_lightning.evaluation.prompts import read_prompts
from sjd2_lightning.models.registry import FAMILIES


def picture(number: int, kind: str = "PNG") -> bytes:
    """A plain picture whose red is its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def red_of(root: Path, record: Record, read: Any = read_stretch) -> int:
    return int(np.asarray(Image.open(io.BytesIO(read(str(root), record))))[0, 0, 0])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures with captions, one without, one torn, one of a strange name."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for number in range(12):
        name = f"p{number}" if number < 8 else f"more/p {number}"
        (root / f"{name}.png").write_bytes(picture(number))
        (root / f"{name}.txt").write_text(f"picture {number}\n")
    (root / "silent.png").write_bytes(picture(99))
    (root / "torn.png").write_bytes(picture(98)[:40])
    (root / "torn.txt").write_text("torn")
    return root


def test_folder_with_texts(photos: Path) -> None:
    records = folder_records(photos)
    assert [(r.name, r.problem) for r in records if r.problem] == [("silent.png", "no caption")]
    assert len(records) == 14
    for record in filter(lambda record: not record.problem, records):
        assert KEY.fullmatch(record.key)
        if record.caption != "torn":
            assert record.caption == f"picture {red_of(photos, record)}"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_with_metadata(photos: Path, kind: str) -> None:
    rows = [("p3.png", "three, said one"), ("more/p 9.png", 'the "ninth"'), ("silent.png", "")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
    else:
        lines = [
            "file_name,caption",
            'p3.png,"three, said one"',
            'more/p 9.png,"the ""ninth"""',
            "silent.png,",
        ]
    (photos / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    for path in photos.rglob("*.txt"):
        path.unlink()
    records = folder_records(photos)
    kept = [record for record in records if not record.problem]
    assert [(r.caption, red_of(photos, r)) for r in kept] == [("three, said one", 3), ('the "ninth"', 9)]
    silent, *others = (record for record in records if record.problem)
    assert (silent.name, silent.problem) == ("silent.png", "no caption")
    assert len(others) == 11, "of 12 with a caption two have rows; one is torn"
    assert {record.problem for record in others} == {f"no caption (no row in metadata.{kind})"}


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png"])
def test_metadata_cannot_lead_out_of_the_folder(photos: Path, name: str) -> None:
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": name, "caption": "x"}) + "\n")
    with pytest.raises(ValueError, match="leads out of"):
        folder_records(photos)


@pytest.mark.parametrize(("line", "message"), [("{", "line 1 is no JSON"), ('{"a": 1}', "no file_name")])
def test_metadata_that_cannot_be_read_is_named(photos: Path, line: str, message: str) -> None:
    (photos / "metadata.jsonl").write_text(line)
    (record,) = (record for record in folder_records(photos) if "line" in record.name)
    assert record.name == "metadata.jsonl/line 1"
    assert message in record.problem


def test_empty_and_missing_folders_say_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"put <name>.txt beside <name>.jpg"):
        folder_records(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        folder_records(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no .tar files"):
        tar_records(tmp_path)


def test_pictures_of_one_name_are_two(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        (tmp_path / f"a.{suffix}").write_bytes(picture(1))
    (tmp_path / "a.txt").write_text("a")
    first, second = folder_records(tmp_path)
    assert first.key != second.key


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_img2dataset_tars(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"0000{shard}.tar", "w") as tar:
            for number in range(3):
                add(tar, f"0000{shard}{number}.jpg", picture(40 * shard + 20 * number, "JPEG"))
                add(tar, f"0000{shard}{number}.json", json.dumps({"caption": f"json {number}"}).encode())
                if number:
                    add(tar, f"0000{shard}{number}.txt", f"text {number}".encode())
            add(tar, "wordless.jpg", picture(1))
            add(tar, "broken.json", b"{")
    found = tar_records(tmp_path)
    assert [r.name for r in found if r.problem] == ["00000.tar/wordless.jpg", "00001.tar/wordless.jpg"]
    records = [record for record in found if not record.problem]
    assert [r.caption for r in records] == ["json 0", "text 1", "text 2"] * 2
    assert [round(red_of(tmp_path, r), -1) for r in records] == [0, 20, 40, 40, 60, 80]
    assert len({r.key for r in records}) == 6
    (alone,) = {r.file for r in tar_records(tmp_path / "00001.tar")}
    assert alone == "00001.tar"


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        add(tar, "a.jpg", picture(1))
    with pytest.raises(ValueError, match=r"cannot be read as a tar .* give an uncompressed one"):
        tar_records(tmp_path)


def coco(tmp_path: Path) -> tuple[Path, Path]:
    root = tmp_path / "train2017"
    root.mkdir()
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 8} for n in (20, 10)]
    for image in images:
        (root / str(image["file_name"])).write_bytes(picture(int(str(image["id"])), "JPEG"))
    texts = [(5, 10, "b\n"), (3, 10, "a"), (4, 20, "c"), (6, 10, " ")]
    notes = [{"id": i, "image_id": image, "caption": caption} for i, image, caption in texts]
    path = tmp_path / "captions_train2017.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    return root, path


def test_coco(tmp_path: Path) -> None:
    root, annotations = coco(tmp_path)
    assert [(r.key, r.caption) for r in coco_records(root, annotations)] == [
        ("000000000010", "a"),
        ("000000000020", "c"),
    ]
    records = coco_records(root, annotations, None)
    assert [(r.key, r.caption, red_of(root, r)) for r in records] == [
        ("000000000010", "a", 10),
        ("000000000010_c1", "b", 10),
        ("000000000020", "c", 20),
    ]
    with pytest.raises(ValueError, match="cannot be read as COCO captions"):
        coco_records(root, root / "000000000010.jpg")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Two parquet files of several row groups, and an arrow file as `save_to_disk` writes it."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def table(first: int, count: int) -> Any:
        images = [{"bytes": picture(first + n), "path": None} for n in range(count)]
        return pa.table({"image": images, "text": [f"picture {first + n}" for n in range(count)]})

    root = tmp_path / "tables"
    (root / "data").mkdir(parents=True)
    pq.write_table(table(0, 10), root / "data" / "a.parquet", row_group_size=4)
    pq.write_table(table(10, 5), root / "data" / "b.parquet", row_group_size=2)
    arrow = table(15, 6)
    path = str(root / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, arrow.schema) as writer:
        writer.write_table(arrow, max_chunksize=4)
    return root


def test_hugging_face_tables(tables: Path) -> None:
    records = table_records(tables, None, None)
    assert len(records) == len({r.key for r in records}) == 21
    for record in chosen_records(records, "train", 0, 0, None, block_of):
        assert record.caption == f"picture {red_of(tables, record, read_cell)}"
    with pytest.raises(ValueError, match="has the columns image, text; say with --image-column"):
        table_records(tables, "photo", None)
    with pytest.raises(ValueError, match=r"no .parquet or .arrow files; for an imagefolder use"):
        table_records(tables / "none", None, None)


def test_blocks_stay_together_and_are_mixed(tables: Path) -> None:
    chosen = chosen_records(table_records(tables, None, None), "train", 0, 0, None, block_of)
    blocks = [block_of(record) for record in chosen]
    changes = sum(a != b for a, b in itertools.pairwise(blocks))
    assert changes == len(set(blocks)) - 1
    assert blocks != sorted(blocks)


def test_tables_without_pyarrow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    hf_source._columns.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'sjd2-lightning\[parquet\]'"):
        table_records(tmp_path, None, None)


def test_a_split_keeps_pictures_together_and_does_not_move_them() -> None:
    records = [Record(f"p{n}_c{c}", "x", f"p{n}.jpg", 0, 1) for n in range(400) for c in range(2)]
    train, val = (chosen_records(records, split, 0.1, 0, None) for split in ("train", "val"))
    assert len(train) + len(val) == 800
    assert not {r.file for r in train} & {r.file for r in val}
    assert 40 <= len(val) <= 120
    assert all(a.file == b.file for a, b in zip(train[::2], train[1::2], strict=True))
    assert train != records
    fewer = chosen_records(records[:400], "val", 0.1, 7, None)
    assert {r.file for r in fewer} == {r.file for r in val if int(r.file[1:-4]) < 200}
    assert len({r.file for r in chosen_records(records, "val", 1, 0, 5)}) == 5


def test_a_small_set_holds_out_eight_or_a_fifth() -> None:
    """Which ones depends on the names alone."""
    records = [Record(f"p{n}", "a", f"p{n}.png", 0, 1) for n in range(1000)]
    for size, held_out in ((5, 1), (12, 2), (40, 8), (1000, 8)):
        share = share_of_fewest(records[:size], 8)
        assert len(chosen_records(records[:size], "val", share, 0, None)) == held_out
        again = share_of_fewest(records[:size][::-1], 8)
        assert again == share
    assert share_of_fewest(records[:1], 8) > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--model-family", "emu3", "--model-path", "random_tiny", "--image-size", "16"],
            "model=emu3 model.init=random_tiny",
        ),
        (
            ["--model-family", "emu3", "--model-path", "weights/emu3_gen"],
            "model=emu3 'model.image_size=[128,128]'",
        ),
        (["--model-family", "chameleon", "--model-path", "weights/tiny"], ""),
        (["--model-family", "chameleon", "--model-path", "my own"], "'model.path=my own'"),
        (["--tokenizer", "weights/janus_pro_1b/tokenizer", "--image-size", "384"], "model=janus_pro"),
    ],
)
def test_the_printed_command_chooses_the_model_and_its_size(words: list[str], told: str) -> None:
    options = prepare.build_parser().parse_args(["folder", "--out", "d", *words])
    assert (
        prepare.training_command(options, True) == f"sjd2 train data=shards data.data_dir=d {told}".rstrip()
    )


def test_the_printed_command_of_emoji_builds_nothing_anew() -> None:
    options = prepare.build_parser().parse_args(["emoji", "--out", "d", "--views", "1", "--max-images", "8"])
    told = "sjd2 train data=emoji data.data_dir=d data.views=1 data.max_images=8"
    assert prepare.training_command(options, True) == told


def test_keys_are_plain() -> None:
    names = ["a.png", "a b.png", "a_b.png", "ü/x.jpg", "c.d.png", "x" * 300 + ".jpg", "00000.tar/0"]
    keys = [key_of(name) for name in names]
    assert all(KEY.fullmatch(key) for key in keys)
    assert len(set(keys)) == len(names)
    assert keys[0] == "a"


def run(*arguments: object) -> None:
    prepare.main([str(argument) for argument in arguments])


def test_command_line_from_folder_to_samples(
    photos: Path, tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["folder", "--input", photos, "--out", out]
    options += ["--val-share", 0.3, "--max-bad-share", 0.5]
    run(*options, "--model-family", "chameleon", "--model-path", tiny_weights, "--attribution", "mine")
    printed = capsys.readouterr().out
    assert "unusable pictures left out" in printed
    count = ShardIndex.load(out / "codes" / "train").num_samples
    own = f"model.path={tiny_weights}"
    assert f"sjd2 train data=shards data.data_dir={out} {own} data.batch_size={count}\n" in printed
    samples = {}
    for split in ("train", "val"):
        index = ShardIndex.load(out / "codes" / split)
        meta = index.meta
        assert (meta.source, meta.attribution, meta.transform) == ("photos", "mine", CROPPED)
        assert (meta.height, meta.width, meta.pixel_size, meta.num_codes) == (16, 16, (128, 128), 2048)
        assert meta.tokenizer == f"chameleon in {tiny_weights}"
        samples |= {sample.caption: sample for sample in read_all(out / "codes" / split)}
    assert sorted(samples) == sorted(f"picture {n}" for n in range(12))
    prompts = [item.prompt for item in read_prompts(out / "prompts.json") if item.prompt != "torn"]
    assert sorted(prompts) == sorted(s.caption for s in read_all(out / "codes" / "val"))
    run(*options, "--split", "train")
    assert ShardIndex.load(out / "raw" / "train").num_samples == 12
    assert f"sjd2 train data=raw data.data_dir={out} data.batch_size=12\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "--input", "."], "needs --annotations"),
        (["folder"], "needs --input"),
        (["folder", "--input", ".", "--model-family", "emu3"], "needs --model-path"),
        (["folder", "--input", ".", "--image-size", "1", "2", "3"], "give height and width"),
        (["folder", "--input", ".", "--max-bad-share", "nan"], "--max-bad-share nan: is a share"),
        (["folder", "--input", ".", "--val-share", "1.5"], "--val-share 1.5: is a share"),
    ],
)
def test_command_line_says_what_is_missing(
    photos: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photos)
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_makes_shards(photos: Path, tmp_path: Path, family: str) -> None:
    size = {"emu3": 16, "janus": 64, "glm_image": 64, "llamagen": 64}.get(family, 32)
    options = ["--image-size", size, "--split", "train", "--workers", 0, "--max-images", 2]
    run(
        "folder",
        "--input",
        photos,
        "--out",
        tmp_path,
        "--model-family",
        family,
        "--model-path",
        "random_tiny",
        *options,
    )
    meta = ShardIndex.load(tmp_path / "codes" / "train").meta
    assert meta.tokenizer == f"{family}, random weights"
