"""Prompts: the held-out names, files, and what is refused."""

import gzip
import io
import json
import tarfile

import pytest

from sjd2_lightning.data.sources.emoji import load_emoji_index
from sjd2_lightning.evaluation.prompts import (
    PromptItem,
    check_prompts,
    held_out_prompts,
    read_prompts,
    repeat_prompts,
)


def test_held_out_prompts_are_spread_over_concepts_and_fixed():
    concepts = {item.key: item.concept for item in load_emoji_index() if item.split == "val"}
    num_concepts = len(set(concepts.values()))
    prompts = held_out_prompts(num_concepts)
    assert len({concepts[item.key] for item in prompts}) == num_concepts
    assert held_out_prompts(7) == prompts[:7] == held_out_prompts(7)
    assert held_out_prompts(7, seed=1) != prompts[:7]
    everything = held_out_prompts()
    assert {item.key for item in everything} == set(concepts)
    assert len({item.seed for item in everything}) == len(everything)
    check_prompts(everything)


def test_repeats_have_seeds_and_keys_of_their_own():
    prompts = held_out_prompts(3)
    repeated = repeat_prompts(prompts, 3)
    assert repeated[:3] == prompts
    assert repeat_prompts(prompts, 2) == repeated[:6]
    assert len({item.seed for item in repeated}) == len({item.key for item in repeated}) == 9
    check_prompts(repeated)


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("red heart\n a cat \n")
    (tmp_path / "b.json").write_text(json.dumps(["red heart", {"prompt": "a cat", "key": "cat", "seed": 4}]))
    first, second = read_prompts(tmp_path / "a.txt"), read_prompts(tmp_path / "b.json")
    assert [item.prompt for item in first] == ["red heart", "a cat"] == [item.prompt for item in second]
    assert first[0] == second[0]
    assert second[1] == PromptItem("cat", "a cat", 4)


def test_a_table_of_prompts(tmp_path):
    """PartiPrompts as it is published: quotation marks are text, and a text may stand in two rows."""
    rows = [
        "a cat\tAnimals\tBasic\t",
        '"Fly" on a wall, "high"\tArts\tComplex\tDALL-E',
        "a cat\tArts\tBasic\t",
    ]
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]) + "\n")
    found = read_prompts(path)
    assert [item.prompt for item in found] == ["a cat", '"Fly" on a wall, "high"', "a cat"]
    assert [item.key for item in found] == ["00000", "00001", "00002"]
    assert len({item.seed for item in found}) == 3
    for content, named in (
        ("Text\tCategory\na\tb", "names no column `Prompt`, but text, category"),
        ("Prompt\tCategory\na\tb\tc", "line 2 has 3 fields, and the first line 2"),
        ("Prompt\tCategory\n \tb", "prompt '00000' is empty"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=named):
            read_prompts(path)


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_a_webdataset_file(tmp_path):
    files = {
        "./0001.txt": b" a cat\n",
        "./0001.jpg": b"pixels",
        "set/0002.json": b'{"prompt": "red heart", "seed": 4}',
        "set/0003.txt": b"a cat",
        "set/0003.json": b'{"prompt": "a dog", "key": "dog"}',
    }
    write_tar(tmp_path / "a.tar", files)
    found = read_prompts(tmp_path / "a.tar")
    assert [(item.key, item.prompt) for item in found] == [
        ("0001", "a cat"), ("set-0002", "red heart"), ("dog", "a dog")
    ]  # fmt: skip
    assert found[1].seed == 4
    for files, message in (
        ({}, "no prompts"),
        ({"a.json": b"{"}, "cannot be read"),
        ({"a.txt": b""}, "empty"),
    ):
        write_tar(tmp_path / "a.tar", files)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a\.tar cannot be read"):
        read_prompts(tmp_path / "a.tar")


THREE = ["red apple", "blue cat", "a house"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.txt", "\ufeffred apple\nblue cat\na house"),
        ("windows.txt", "red apple\r\nblue cat\r\na house\r\n"),
        ("old_mac.txt", "red apple\rblue cat\ra house\r"),
        ("blanks.txt", "red apple \nblue\tcat\na  house\n \n\n"),
        ("other_ends.txt", "red\x85apple\nblue\u2028cat\n\x0ba house"),
        ("CAPITALS.TXT", "red apple\nblue cat\na house"),
        ("mark.json", "\ufeff" + json.dumps(THREE)),
        ("nulls.json", json.dumps([{"prompt": text, "key": None, "seed": None} for text in THREE])),
        ("lines.jsonl", "".join(json.dumps({"prompt": text}) + "\r\n" for text in THREE)),
        ("lines.JSONL", "\ufeff" + "\n".join(map(json.dumps, THREE))),
    ],
)
def test_files_as_people_have_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(THREE))
    assert read_prompts(tmp_path / name) == read_prompts(plain)


def in_tar(*endings, name="{number:04d}", caption=True):
    files = {}
    for number, text in enumerate(THREE):
        facts = {"caption": text, "url": "u"} if caption else {"caption": None, "size": [8, 8], "crc32": 1}
        content = {"txt": text.encode(), "json": json.dumps(facts).encode()}
        files |= {f"{name.format(number=number)}.{e}": content.get(e.lower(), b"\0") for e in endings}
    return files


@pytest.mark.parametrize(
    ("files", "keys"),
    [
        (in_tar("jpg", "txt", "json"), ["0000", "0001", "0002"]),
        (in_tar("jpg", "json"), ["0000", "0001", "0002"]),
        (in_tar("jpg", "txt", "json", caption=False), ["0000", "0001", "0002"]),
        (in_tar("image_ids.npy", "txt", "json", name="k{number}", caption=False), ["k0", "k1", "k2"]),
        (in_tar("JPG", "TXT"), ["0000", "0001", "0002"]),
        (in_tar("txt", name="./a/{number}"), ["a-0", "a-1", "a-2"]),
        (in_tar("txt", name="cat.{number}"), ["cat.0", "cat.1", "cat.2"]),
        (in_tar("txt", name="._{number}") | in_tar("txt") | in_tar("txt", name="__MACOSX/{number}"), None),
        (in_tar("txt", name="красный {number}"), []),
    ],
)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tars_as_people_have_them(tmp_path, files, keys, suffix):
    path = tmp_path / f"a.{suffix}"
    write_tar(path, files)
    if suffix == "tar.gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = read_prompts(path)
    assert [item.prompt for item in found] == THREE
    assert keys == [] or [item.key for item in found] == (keys or ["0000", "0001", "0002"])


def test_broken_tars_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    for files, message in (
        (in_tar("jpg"), "'0000' is empty"),
        (in_tar("jpg", "txt") | {"0001.txt": b"carr\xe9"}, "sample 0001: not UTF-8"),
        (in_tar("txt") | {"9.json": b'{"prompt": "red", "sed": 1}'}, "unknown fields"),
    ):
        write_tar(path, files)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
    write_tar(path, in_tar("txt"))
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(ValueError, match="byte 2048: ends early"):
        read_prompts(path)


def test_texts_that_have_keys_of_their_own_may_repeat(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "red", "key": "a"}, {"prompt": "red", "key": "b"}]')
    assert len(read_prompts(tmp_path / "a.json")) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "red\n\nblue\n", "'prompt-00001' is empty"),
        ("a.txt", "", "is empty"),
        ("a.txt", "red\nblue\nred \n", "'red' occurs 2 times; leave it once"),
        ("a.json", '["red", {"prompt": "red", "seed": 1}]', "'red' occurs 2 times"),
        ("a.json", "[", "cannot be read"),
        ("a.json", "{}", "expected a JSON list"),
        ("a.json", '[{"text": "red"}]', "entry 1 is neither"),
        ("a.json", '[{"prompt": "red", "sed": 1}]', "unknown fields"),
        ("a.json", '[{"prompt": "red", "seed": "1"}]', "must be an integer"),
        ("a.json", '[{"prompt": "red", "key": "A"}, {"prompt": "blue", "key": "a"}]', "'a' occurs 2 times"),
        ("a.json", '[{"prompt": "red", "key": "../a"}]', "cannot name a file"),
        ("a.csv", "red", "must end in"),
        ("a.json", '[{"prompt": "red", "key": 1.5}]', "has key 1.5; it must be a text"),
        ("a.json", '["\\ud800 red"]', "entry 1 is not UTF-8"),
        ("a.jsonl", '"red"\n{', "cannot be read: no JSON"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "gbk"])
@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_text_of_other_encodings_is_refused(tmp_path, name, encoding):
    letters = "方块" if encoding == "gbk" else "café"
    text = letters if name == "a.txt" else json.dumps([letters], ensure_ascii=False)
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"{name} cannot be read: not UTF-8 .*; save it as UTF-8"):
        read_prompts(tmp_path / name)


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="there are no prompts"):
        check_prompts([])
    with pytest.raises(ValueError, match="has seed -1"):
        check_prompts([PromptItem("a", "red", -1)])
    with pytest.raises(ValueError, match="num_prompts is 100000"):
        held_out_prompts(100000)
    with pytest.raises(ValueError, match="samples_per_prompt is 0"):
        repeat_prompts(held_out_prompts(1), 0)
