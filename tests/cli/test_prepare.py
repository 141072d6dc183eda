"""Emoji shards: views, split, and building only when needed."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sjd2_lightning.cli import prepare
from sjd2_lightning.data import ensure
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.data.sources.emoji import ATTRIBUTION, load_emoji_index, prepare_emoji, render, words
from tests.tools.shards import GreyTokenizer, WriteCodes


@pytest.fixture
def emoji_dir(tmp_path: Path, grey_tokenizer: GreyTokenizer) -> Path:
    prepare_emoji(tmp_path, grey_tokenizer, views=3, max_images=6, samples_per_shard=8, show_progress=False)
    return tmp_path


def facts(index: ShardIndex) -> dict[str, dict[str, object]]:
    found = {}
    for shard in index.shards:
        with tarfile.open(index.folder / shard.name) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(
                        io.BytesIO(tar.extractfile(member).read())
                    )  # type: ignore[union-attr]
    return found


def test_folders_counts_and_licence(emoji_dir: Path) -> None:
    sizes = {}
    for path in sorted(emoji_dir.glob("*/*/index.json")):
        index = ShardIndex.load(path.parent)
        index.check_files()
        assert index.meta.attribution == ATTRIBUTION
        sizes[f"{index.meta.kind}/{index.meta.split}"] = index.num_samples
    assert sizes == {"codes/train": 18, "codes/val": 6, "raw/train": 6, "raw/val": 6}


def test_view_0_is_the_canonical_picture_and_the_others_differ(emoji_dir: Path) -> None:
    pictures = {item.key: item for item in load_emoji_index()}
    codes = {sample.key: sample for sample in read_all(str(emoji_dir / "codes" / "train"))}
    views = facts(ShardIndex.load(emoji_dir / "codes" / "train"))
    canonical = [key for key in codes if key in pictures]
    assert len(canonical) == 6
    differing = 0
    for key in canonical:
        image = torch.from_numpy(np.array(render(pictures[key].path))).permute(2, 0, 1).float() / 255
        wanted = GreyTokenizer().encode(image[None])[0]
        assert torch.equal(codes[key].image_ids, wanted)
        assert views[key]["view"] == 0
        for view in (1, 2):
            other = codes[f"{key}_v{view}"]
            assert views[other.key]["view"] == view
            assert other.caption == codes[key].caption == pictures[key].caption
            differing += not torch.equal(other.image_ids, wanted)
    assert differing >= 8, "of 12 views: one in six keeps the size, and some shift by less than a code"


def test_raw_shards_hold_the_canonical_pictures(emoji_dir: Path) -> None:
    pictures = {item.key: item for item in load_emoji_index()}
    for sample in read_all(str(emoji_dir / "raw" / "val")):
        np.testing.assert_array_equal(sample.image, render(pictures[sample.key].path))


def test_no_concept_and_no_picture_is_in_both_splits(emoji_dir: Path) -> None:
    train, val = ({item for item in load_emoji_index() if item.split == split} for split in ("train", "val"))
    assert 0.03 < len(val) / (len(train) + len(val)) < 0.2
    assert not {item.concept for item in train} & {item.concept for item in val}
    assert not {item.caption for item in train} & {item.caption for item in val}
    train_facts, val_facts = (
        facts(ShardIndex.load(emoji_dir / "codes" / split)) for split in ("train", "val")
    )
    assert {fact["concept"] for fact in train_facts.values()} <= {item.concept for item in train}
    assert {fact["concept"] for fact in val_facts.values()} <= {item.concept for item in val}


def test_concepts_ignore_skin_tone_and_gender() -> None:
    concepts: dict[str, set[str]] = {}
    for item in load_emoji_index():
        bare = re.sub(r" (medium-|)(light|dark|medium) skin tone$", "", item.caption)
        concepts.setdefault(re.sub(r"\b(man|woman) ", "", bare), set()).add(item.split)
    assert [name for name, splits in concepts.items() if len(splits) > 1] == []


def test_fresh_shards_are_not_built_again(emoji_dir: Path) -> None:
    tokenizer = GreyTokenizer()
    before = {path: path.stat().st_mtime_ns for path in emoji_dir.rglob("*.tar")}
    prepare_emoji(emoji_dir, tokenizer, views=3, max_images=6, samples_per_shard=8)
    assert tokenizer.num_encoded == 0
    assert {path: path.stat().st_mtime_ns for path in emoji_dir.rglob("*.tar")} == before


@pytest.mark.parametrize(
    ("changed", "num_encoded"),
    [({"identity": "grey-2"}, 24), ({"views": 2}, 12)],  # other views leave the validation shards fresh
)
def test_stale_shards_are_built_again(emoji_dir: Path, changed: dict[str, object], num_encoded: int) -> None:
    options = {"views": 3, "identity": "grey-1"} | changed
    tokenizer = GreyTokenizer(identity=str(options["identity"]))
    indexes = prepare_emoji(
        emoji_dir,
        tokenizer,
        int(str(options["views"])),
        max_images=6,
        samples_per_shard=8,
        show_progress=False,
    )
    assert tokenizer.num_encoded == num_encoded
    assert indexes["codes/train"].meta.tokenizer_hash == tokenizer.identity
    assert indexes["codes/train"] == ShardIndex.load(emoji_dir / "codes" / "train")


def test_a_new_code_version_makes_shards_stale(emoji_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensure, "CODE_VERSION", ensure.CODE_VERSION + 1)
    tokenizer = GreyTokenizer()
    prepare_emoji(emoji_dir, tokenizer, views=3, max_images=6, samples_per_shard=8, show_progress=False)
    assert tokenizer.num_encoded == 24


def test_an_interrupted_build_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    class Stops(GreyTokenizer):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_emoji(tmp_path, Stops(), max_images=2, show_progress=False)
    assert [path.name for path in (tmp_path / "codes").iterdir()] == [".train-building"]
    (tmp_path / "codes" / ".train-old-killed").mkdir()
    indexes = prepare_emoji(tmp_path, GreyTokenizer(), max_images=2, show_progress=False)
    assert indexes["codes/train"].num_samples == 8
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == ["train", "val"]


def test_shards_of_an_older_format_are_built_again(tmp_path: Path) -> None:
    prepare_emoji(tmp_path, max_images=2, show_progress=False)
    path = tmp_path / "raw" / "train" / "index.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(ValueError, match="no index of format 2"):
        ShardIndex.load(path.parent)
    prepare_emoji(tmp_path, max_images=2, show_progress=False)
    assert ShardIndex.load(path.parent).num_samples == 2


def test_a_picture_does_not_depend_on_what_else_is_prepared(tmp_path: Path, emoji_dir: Path) -> None:
    prepare_emoji(tmp_path / "more", GreyTokenizer(), views=2, max_images=8, show_progress=False)
    more = {sample.key: sample.image_ids for sample in read_all(str(tmp_path / "more" / "codes" / "train"))}
    few = {sample.key: sample.image_ids for sample in read_all(str(emoji_dir / "codes" / "train"))}
    shared = [key for key in few if key in more]
    assert len(shared) == 12
    assert all(torch.equal(few[key], more[key]) for key in shared)


def test_shards_of_another_source_are_not_overwritten(write_codes: WriteCodes, tmp_path: Path) -> None:
    index = write_codes(8)
    with pytest.raises(ValueError, match="holds shards of 'made up', not of 'emoji'"):
        prepare_emoji(tmp_path, GreyTokenizer(), max_images=2, show_progress=False)
    assert len(list(read_all(index.folder))) == 8


def test_files_that_are_no_shards_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "raw" / "train").mkdir(parents=True)
    (tmp_path / "raw" / "train" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds files but no index.json"):
        prepare_emoji(tmp_path, max_images=2, show_progress=False)
    with pytest.raises(ValueError, match=r"data\.views"):
        prepare_emoji(tmp_path, views=0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.main(["emoji", "--out", str(tmp_path), "--max-images", "2"])
    assert "val: 2 samples in 1 shards" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prepare.main(["emoji", "--out", str(tmp_path), "--tokenizer", str(tmp_path / "none")])
    assert "no image tokenizer" in capsys.readouterr().err


def test_the_words_of_a_held_out_name_stay_in_training() -> None:
    concepts: dict[str, dict[str, set[str]]] = {"train": {}, "val": {}}
    for item in load_emoji_index():
        concepts[item.split].setdefault(item.concept, set()).update(words(item.caption))
    trained = Counter(word for own in concepts["train"].values() for word in own)
    held_out = Counter(word for own in concepts["val"].values() for word in own)
    assert all(trained[word] >= 3 and trained[word] >= 2 * held_out[word] for word in held_out)
