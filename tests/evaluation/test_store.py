"""Records on disk: what a kill leaves behind, and folders of another configuration."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from sjd2_lightning.data.pictures import LazyImages
from sjd2_lightning.decoding.config import Correction, DecodingConfig, Drafting
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.evaluation.store import ImageRecord, RecordStore, discard_other_run, method_fields
from sjd2_lightning.noise import NoiseProcess
from sjd2_lightning.run.files import remove_leftovers, sha256_of_json, write_whole
from sjd2_lightning.run.provenance import weights_sha256
from tests.tools.small_evaluation import METHODS, PROMPTS, evaluate, small_backbone

RECORD = ImageRecord(
    key="a",
    prompt="red “heart”",
    seed=1,
    method="ar",
    batch=0,
    batch_size=1,
    nfe=2,
    num_generated=3,
    accepted=(1, 2),
    settled_iteration=(0, 1),
    image_ids=(5, 6),
    size=(1, 2),
    seconds=0.5,
    process="x",
)
PIXELS = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3)


def other(key: str) -> ImageRecord:
    return dataclasses.replace(RECORD, key=key)


def test_records_and_images_come_back_as_they_were(tmp_path):
    store = RecordStore(tmp_path, {"weights": "w"})
    store.append([RECORD], [PIXELS])
    loaded = RecordStore(tmp_path, {"weights": "w"}).load()
    assert loaded == [RECORD]
    assert torch.equal(store.images(loaded)[0], PIXELS)


def test_identity_of_a_method_is_that_of_the_first_version(tmp_path):
    """Folders that 0.1.0 wrote continue: this hash was taken there, where noise was no group of its own."""
    noise = NoiseProcess(schedule="karras", source="mean", state="draft")
    sampling = Sampling(0.9, guidance_scale=2.0)
    config = DecodingConfig("sjd2", window=16, num_levels=2, noise=noise, sampling=sampling)
    held = "cb7d92fec25d85a3b959c4b6462bd83f3b8da3ae5891db30f3a52308613fc429"
    assert sha256_of_json(method_fields(config)) == held
    later = (
        {"engine": "compiled"},
        {"engine": "graphs"},
        {"attention": "flex"},
        {"invariant": True},
        {"window_shape": 32},
        {"corrector": Correction("own")},
        {"drafter": Drafting(str(tmp_path / "corrector.safetensors"))},
        {"corrector": Correction(str(tmp_path / "corrector.safetensors"))},
    )
    (tmp_path / "corrector.safetensors").write_bytes(b"weights")
    configs = [dataclasses.replace(config, **each) for each in ({}, *later)]
    assert len({sha256_of_json(method_fields(each)) for each in configs}) == 9
    before = [sha256_of_json(method_fields(each)) for each in configs[-2:]]
    (tmp_path / "corrector.safetensors").write_bytes(b"others")
    after = [sha256_of_json(method_fields(each)) for each in configs[-2:]]
    assert not set(before) & set(after), "they were trained anew"


def test_ranks_write_apart_and_are_read_together(tmp_path):
    for rank, key in enumerate("ab"):
        RecordStore(tmp_path, {}, rank).append([other(key)], [PIXELS])
    assert [record.key for record in RecordStore(tmp_path, {}).load()] == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    store = RecordStore(tmp_path, {})
    store.append([RECORD, other("b")], [PIXELS, PIXELS])
    data = store.path.read_bytes()
    store.path.write_bytes(data[:-cut])
    assert [record.key for record in store.load()] == ["a"]
    again = RecordStore(tmp_path, {})
    again.append([other("b")], [PIXELS])
    assert again.path.read_bytes() == data
    assert [record.key for record in again.load()] == ["a", "b"]


def test_a_record_without_its_image_is_work_to_do(tmp_path):
    store = RecordStore(tmp_path, {})
    store.append([RECORD], [PIXELS])
    store.image_path(RECORD).unlink()
    assert store.load() == []


def test_a_folder_belongs_to_one_configuration(tmp_path):
    identity = {"weights": "w", "methods": {"sjd": {"window": 32}}}
    RecordStore(tmp_path, identity).append([RECORD], [PIXELS])
    changed = {"weights": "w", "methods": {"sjd": {"window": 16}}}
    with pytest.raises(ValueError, match=r"another configuration \(methods.sjd.window differ"):
        RecordStore(tmp_path, changed)
    (tmp_path / "report.json").write_text("{}")
    assert not discard_other_run(tmp_path, identity)
    assert discard_other_run(tmp_path, changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
    assert RecordStore(tmp_path, changed).load() == []
    assert not discard_other_run(tmp_path / "absent", changed)


def test_broken_files_are_named(tmp_path):
    store = RecordStore(tmp_path, {})
    store.append([RECORD], [PIXELS])
    store.image_path(RECORD).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        list(store.images(store.load()))
    store.path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no record"):
        store.load()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        RecordStore(tmp_path, {})
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds records but no run\.json"):
        RecordStore(tmp_path, {})


def test_images_are_read_when_they_are_looked_at():
    seen = []
    images = LazyImages(lambda item: (seen.append(item), torch.full((1,), item))[1], [3, 4, 5])
    assert len(images) == 3
    assert seen == []
    assert [int(image) for image in images[1:]] == [4, 5] == seen
    assert [int(image) for image in images.select([2, 0])] == [5, 3]
    assert int(images[-1]) == 5


def test_temporary_files_of_a_killed_run_are_removed_and_no_others(tmp_path, monkeypatch):
    store = RecordStore(tmp_path, {})
    store.append([RECORD], [PIXELS])
    (tmp_path / ".notes.png.txt").touch()
    before = sorted(tmp_path.rglob("*"))

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # a process that is killed does not clean up behind itself
        patch.setattr("os.fsync", killed)
        patch.setattr("pathlib.Path.unlink", lambda *args, **kwargs: None)
        for path in (store.image_path(other("b")), tmp_path / "run.json", tmp_path / "figures" / "grid.png"):
            with pytest.raises(KeyboardInterrupt):
                write_whole(path, "half")
    assert len(sorted(tmp_path.rglob(".*"))) == 4
    remove_leftovers(tmp_path)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "figures"] == before
    remove_leftovers(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(TypeError):
        write_whole(path, np.zeros(3).tolist())  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_the_first_version_goes_on_with_its_own_weights_only(tmp_path):
    """0.1.0 named weights by sha256: its folder takes the same weights, and no others."""
    some = {"methods": {"sjd": METHODS["sjd"]}, "prompts": PROMPTS[:2]}
    first = evaluate(tmp_path, **some)
    identity = {**first.store.identity, "weights": weights_sha256(small_backbone())}
    run = json.dumps({"hash": sha256_of_json(identity), "identity": identity})
    (tmp_path / "run.json").write_text(run)
    records = (tmp_path / "records.jsonl").read_bytes()
    again = evaluate(tmp_path, **some)
    assert (tmp_path / "records.jsonl").read_bytes() == records
    assert again.store.hash == sha256_of_json(identity)
    with pytest.raises(ValueError, match=r"another configuration \(weights differ"):
        evaluate(tmp_path, backbone=small_backbone(seed=1), **some)
    with pytest.raises(ValueError, match=r"another configuration"):
        evaluate(tmp_path, **{**some, "batch_size": 1})
