"""Images that a teacher draws for a data set's captions: its own, whole after a kill, and readable."""

import json
import tarfile

import pytest
import torch

from sjd2_lightning.cli import teacher as teacher_samples
from sjd2_lightning.cli.teacher import Drawing, draw_shards, drawn_samples, main, real_images
from sjd2_lightning.data.index import ShardIndex, ShardMeta
from sjd2_lightning.data.reading import read_all
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation.prompts import seed_of
from tests.tools.shards import write_shards
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

PIXELS = (6, 4)  # 3 x 2 codes


def unseen(count, note=""):
    """A bar of progress that nobody sees."""


SAMPLING = Sampling(0.9, guidance_scale=2.0)
NUM_SAMPLES = 22


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    made = tiny_chameleon(7, seed=2, scale=0.7).eval()
    made.save(folder)
    made.folder = folder
    return made


@pytest.fixture
def source(backbone, tmp_path):
    """A data set of two shards and a bit, and its validation shard."""
    for split in ("train", "val"):
        facts = {"num_codes": 7, "tokenizer_hash": backbone.image_tokenizer.identity, "pixel_size": PIXELS}
        meta = ShardMeta("codes", split, "made up", 3, 2, "nobody", "hash", **facts)
        codes = torch.randint(7, (NUM_SAMPLES, 3, 2), generator=torch.Generator().manual_seed(len(split)))
        samples = [
            {"key": f"{split}{n}", "caption": RAGGED_PROMPTS[n % 4], "image_ids": image.numpy()}
            for n, image in enumerate(codes)
        ]
        write_shards(samples, tmp_path / "codes" / split, 10, meta)
    return tmp_path / "codes"


def drawing(**values) -> Drawing:
    return Drawing(**{"sampling": SAMPLING, "batch": 4, "samples_per_shard": 8} | values)


def draw(backbone, source, out, **values) -> ShardIndex:
    return draw_shards(backbone, backbone.folder, real_images(source, out), out, drawing(**values))


def test_images_are_what_decoding_gives(backbone, source, tmp_path):
    """Of each caption alone, by the seed of its key: the batch plays no part."""
    out = tmp_path / "drawn"
    index = draw(backbone, source, out)
    assert [shard.num_samples for shard in index.shards] == [8, 8, 6]
    config, layout = DecodingConfig("ar", 1, sampling=SAMPLING), backbone.layout(*PIXELS)
    real = list(read_all(source / "train"))
    found = list(read_all(out / "train"))
    assert [sample[:2] for sample in found] == [sample[:2] for sample in real]
    for sample in found[::5]:
        alone = decode(backbone, [sample.caption], [seed_of(sample.key)], config, layout)
        assert torch.equal(alone.image_ids[0], sample.image_ids), sample.key
    assert not all(torch.equal(a.image_ids, b.image_ids) for a, b in zip(found, real, strict=True))
    again = draw(backbone, source, tmp_path / "again", batch=7)
    assert again.shards == index.shards
    assert draw(backbone, source, tmp_path / "other", seed=1).shards != index.shards
    held_out = [list(read_all(folder / "val")) for folder in (source, out)]
    assert [s.key for s in held_out[0]] == [s.key for s in held_out[1]]
    assert index.meta.source != ShardIndex.load(source / "train").meta.source, (
        "or training would build it anew"
    )


def test_mixed_labels_keep_real_images(backbone, source, tmp_path):
    how = drawing(real_share=0.5)
    real = list(read_all(source / "train"))
    fields = list(drawn_samples(backbone, real, how, PIXELS, unseen))
    kept = {sample["key"] for sample in fields if not sample["drawn"]}
    assert kept == {sample.key for sample in real if how.keeps(sample.key)}
    assert 0 < len(kept) < NUM_SAMPLES
    for sample, made in zip(real, fields, strict=True):
        if sample.key in kept:
            assert torch.equal(sample.image_ids, torch.from_numpy(made["image_ids"]))
    many = sum(how.keeps(f"k{number}") for number in range(4000))
    assert abs(many - 2000) < 160, "five standard deviations: a false alarm in 2 million seeds"
    index = draw(backbone, source, tmp_path / "mixed", real_share=0.5, num_samples=5)
    with tarfile.open(index.folder / index.shards[0].name) as tar:
        facts = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    assert [fact["drawn"] for fact in facts] == [sample["drawn"] for sample in fields[:5]]


def test_a_kill_loses_one_shard(backbone, source, tmp_path, monkeypatch):
    whole = draw(backbone, source, tmp_path / "whole")
    calls = []

    def killed(*arguments):
        calls.append(len(arguments[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(teacher_samples, "decode", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        draw(backbone, source, out)
    assert not (out / "train").exists()
    found = draw(backbone, source, out)
    assert sum(calls[4:]) == NUM_SAMPLES - 8, "the first shard is not drawn again"
    assert found.shards == whole.shards
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        draw(backbone, source, out, seed=1)
    monkeypatch.undo()
    fresh = draw(backbone, source, tmp_path / "fresh", seed=2)
    assert draw(backbone, source, out, seed=2).shards == fresh.shards, "nothing of another seed counts"


def test_command_line(backbone, source, tmp_path, capsys):
    arguments = [str(source), str(tmp_path / "t" / "codes"), "--weights", str(backbone.folder)]
    main([*arguments, "--num-samples", "3"])
    said = capsys.readouterr().out
    assert f"3 samples; train with data=shards data.data_dir={tmp_path / 't'}" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--real-share", "1"], "--real-share must lie in [0, 1)"),
        (["--batch", "0"], "--batch must be >= 1"),
        (["--temperature", "-1"], "temperature=-1.0: must be at least 0"),
        ([], "No shards in"),
    ],
)
def test_wrong_values_are_said_before_weights_are_read(source, tmp_path, capsys, wrong, said):
    folder = source if wrong else tmp_path / "nothing"
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), str(tmp_path / "out"), "--weights", str(tmp_path / "none"), *wrong])
    assert stopped.value.code == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_of_another_tokenizer_are_refused(backbone, source, tmp_path):
    index = ShardIndex.load(source / "train")
    meta = ShardMeta(**(vars(index.meta) | {"tokenizer_hash": "other"}))
    ShardIndex(index.folder, meta, index.shards).save(source / "train")
    with pytest.raises(ValueError, match="image tokenizer"):
        draw(backbone, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_that_would_be_lost_or_cannot_be_used_is_said_first(backbone, source, tmp_path, capsys):
    """Nothing is drawn or touched: for the real images, a damaged shard, a split that is not there."""
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    weights = ["--weights", str(backbone.folder)]

    def stopped_by(folder, out) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(folder), str(out), *weights])
        assert stopped.value.code == 1
        return capsys.readouterr().err

    assert "holds the real images; name another folder" in stopped_by(source, source / ".." / "codes")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    shard = source / "train" / "train-00001.tar"
    damaged = bytearray(before[shard])
    damaged[600] ^= 1
    shard.write_bytes(bytes(damaged))
    assert "train-00001.tar not as written" in stopped_by(source, tmp_path / "out")
    shard.write_bytes(before[shard])
    for changed, said in (
        ({"kind": "raw"}, "holds pictures, not codes"),
        ({"pixel_size": None}, "how large"),
    ):
        index = ShardIndex.load(source / "train")
        ShardIndex(index.folder, ShardMeta(**(vars(index.meta) | changed)), index.shards).save(
            source / "train"
        )
        assert said in stopped_by(source, tmp_path / "out")
        (source / "train" / "index.json").write_bytes(before[source / "train" / "index.json"])
    (source / "val" / "index.json").unlink()
    assert "No shards in" in stopped_by(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence(backbone, source, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_samples, "write_shard", full)
    with pytest.raises(SystemExit) as stopped:
        main([str(source), str(tmp_path / "out"), "--weights", str(backbone.folder)])
    assert stopped.value.code == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_teacher_whose_numbers_are_not_finite_draws_nothing(source, tmp_path):
    broken = tiny_chameleon(7, seed=2, scale=0.7).eval()
    with torch.no_grad():
        broken.trunk.layers[0].mlp.up_proj.weight[2, 3] = torch.nan
    samples = list(read_all(source / "train"))[:4]
    with pytest.raises(ValueError, match=r"not finite at slot 0.*the weight \S*up_proj"):
        next(drawn_samples(broken, samples, drawing(), PIXELS, unseen))


def test_a_caption_that_is_too_long_keeps_its_own_image(backbone, source, caplog):
    first, *others = list(read_all(source / "train"))[:3]
    long = others[0]._replace(caption="cat " * 244)  # 8 slots, 5 tokens of the template, 256 positions
    found = list(drawn_samples(backbone, [first, long, others[1]], drawing(), PIXELS, unseen))
    assert [sample["drawn"] for sample in found] == [True, False, True]
    assert torch.equal(torch.from_numpy(found[1]["image_ids"]), long.image_ids)
    assert f"{long.key} keeps its own image: its caption has 249 tokens" in caplog.text
