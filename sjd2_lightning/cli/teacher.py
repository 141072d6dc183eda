"""Draws a model's own images for the captions of a data set, for distillation.

Plain autoregression at temperature 1 without guidance, so that the images
follow the law that is to be kept; other values sharpen it. With --real-share
0.5 half of the captions keep the data set's own image: mixed labels, after
CEED-VLA (Song et al. 2025). Validation shards are the data set's own. Finished
shards are kept when the command is stopped, and the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from sjd2_lightning.data.build import replace_folder
from sjd2_lightning.data.datamodule import CaptionLimit
from sjd2_lightning.data.index import INDEX_NAME, Shard, ShardIndex
from sjd2_lightning.data.reading import Sample, read_all
from sjd2_lightning.data.writing import SampleFields, write_shard
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation.prompts import seed_of
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.registry import FAMILIES, load_backbone
from sjd2_lightning.run.files import sha256_of_file, sha256_of_json
from sjd2_lightning.run.stages import Advance, counted, speak, stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """How images are drawn.

    Attributes:
        sampling: temperature and guidance.
        seed: with a sample's key it decides its image, whatever the batch.
        batch: images drawn at once.
        real_share: share of the samples that keep the data set's image.
        num_samples: the first so many samples of the data set; None for all.
        samples_per_shard: number of samples of every shard but the last.
    """

    sampling: Sampling
    seed: int = 0
    batch: int = 64
    real_share: float = 0.0
    num_samples: int | None = None
    samples_per_shard: int = 256

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        found = self.sampling.problems()
        if not 0 <= self.real_share < 1:
            found.append(f"--real-share must lie in [0, 1), got {self.real_share}: 1 is the data set itself")
        for name in ("batch", "num_samples", "samples_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        return found

    def keeps(self, key: str) -> bool:
        """Whether the sample of a key keeps its own image."""
        return seed_of(key, self.seed + 1) < self.real_share * 2**31


def drawn_samples(
    backbone: Backbone, samples: Sequence[Sample], how: Drawing, pixels: tuple[int, int], advance: Advance
) -> Iterator[SampleFields]:
    """The samples with images drawn for their captions; each says in `drawn` whether it was.

    A caption that is longer than the teacher's positions keeps its own image.
    """
    layout = backbone.layout(*pixels)
    limit = CaptionLimit(backbone, layout)
    config = DecodingConfig("ar", window=1, sampling=how.sampling)
    rest = iter(samples)
    while group := list(islice(rest, how.batch)):
        asked = [s for s in group if not how.keeps(s.key) and not _told(limit(s.caption), s.key)]
        images: dict[str, torch.Tensor] = {}
        if asked:
            seeds = [seed_of(sample.key, how.seed) for sample in asked]
            output = decode(backbone, [sample.caption for sample in asked], seeds, config, layout)
            images = dict(zip((sample.key for sample in asked), output.image_ids.cpu(), strict=True))
        for sample in group:
            yield {
                "key": sample.key,
                "caption": sample.caption,
                "drawn": sample.key in images,
                "image_ids": images.get(sample.key, sample.image_ids).numpy(),
            }
        advance(len(group))


def _told(problem: str, key: str) -> str:
    """The problem, which is logged too; "" if there is none."""
    if problem:
        log.warning("%s keeps its own image: its caption has %s", key, problem)
    return problem


def draw_shards(backbone: Backbone, weights: Path, real: ShardIndex, out: Path, how: Drawing) -> ShardIndex:
    """Writes `out`/train with drawn images, and the data set's own validation shards beside it.

    Args:
        backbone: the teacher, in eval mode.
        weights: its folder, whose bytes tell one teacher from another.
        real: the data set's training shards, from `real_images`; its validation shards lie beside them.
        out: folder to write; what lies there is replaced once the new shards are complete.
        how: images are drawn.

    Raises:
        ValueError: the shards are of another image tokenizer than the model's.
    """
    identity = getattr(getattr(backbone, "image_tokenizer", None), "identity", None)
    real.check_model(backbone.num_codes, identity)
    folder, pixels = real.folder, real.meta.pixel_size
    assert isinstance(folder, Path)  # `real_images` takes local folders, and sizes that are known
    assert pixels is not None
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    with stage("identifying the weights"):
        teacher = [[str(path.relative_to(weights)), sha256_of_file(path)] for path in files]
    made_from = sha256_of_json([real.meta.inputs_hash, teacher, repr(replace(how, batch=0))])
    meta = replace(real.meta, source=f"{real.meta.source}, drawn by a teacher", inputs_hash=made_from)
    building = out / ".train-building"
    done = _done(building, made_from)
    num_samples = min(how.num_samples or real.num_samples, real.num_samples)
    num_done = sum(shard.num_samples for shard in done)
    rest = islice(read_all(folder), num_done, num_samples)
    starts = range(num_done, num_samples, how.samples_per_shard)
    with counted("drawing", num_samples, "images") as advance:
        advance(num_done)
        for number, _ in enumerate(starts, len(done)):
            chosen = list(islice(rest, how.samples_per_shard))
            path = building / f"train-{number:05d}.tar"
            done.append(write_shard(path, drawn_samples(backbone, chosen, how, pixels, advance), meta))
            ShardIndex(building, meta, tuple(done)).save(building)
    if (out / "val").exists():
        shutil.rmtree(out / "val")
    shutil.copytree(folder.parent / "val", out / "val")
    replace_folder(building, out / "train")
    return ShardIndex.load(out / "train")


def real_images(source: Path, out: Path) -> ShardIndex:
    """The training shards of a data set, seen to be whole, before anything is drawn or replaced.

    Args:
        source: folder of its shards of codes, with train and val inside.
        out: where drawn images will go.

    Raises:
        ValueError: shards are missing, damaged or of pictures, or `out` is where they lie.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} holds the real images; name another folder for the drawn ones")
    indexes = [ShardIndex.load(source / split) for split in ("train", "val")]
    for index in indexes:
        index.check_codes()
        index.check_files()
        if damaged := index.damaged_shards():
            raise ValueError(
                f"{index.folder}: {', '.join(damaged[:5])} not as written; restore them, or build them again"
            )
    if indexes[0].meta.pixel_size is None:
        raise ValueError(f"{indexes[0].folder} does not say how large its pictures are; build it again")
    return indexes[0]


def _done(building: Path, made_from: str) -> list[Shard]:
    """Shards that an earlier start of the same command finished; other leftovers are removed."""
    if (building / INDEX_NAME).is_file():
        index = ShardIndex.load(building)
        if index.meta.inputs_hash == made_from and not index.damaged_shards():
            return list(index.shards)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return []


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="sjd2 teacher",
        usage="%(prog)s SHARDS OUT --weights FOLDER [options]",
        description=__doc__,
        epilog="example:\n  sjd2 teacher data/scenes_demo/codes data/teacher/codes --weights weights/tiny\n"
        "  sjd2 train data=shards data.data_dir=data/teacher noise.consistency=1",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=25),
    )
    parser.add_argument("shards", type=Path, help="folder of shards of codes, with train and val inside")
    parser.add_argument("out", type=Path, help="folder to write, with train and val inside")
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FOLDER", help="folder of the teacher")
    add("--family", choices=sorted(FAMILIES), default="chameleon", help="its family (chameleon)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--temperature", type=float, default=1.0, metavar="X", help="(default: 1)")
    add("--guidance-scale", type=float, default=1.0, metavar="X", help="1 is off (default: 1)")
    add("--real-share", type=float, default=0.0, metavar="X", help="share that keeps its own image (0)")
    add("--num-samples", type=int, metavar="N", help="the first so many; all without it")
    add("--batch", type=int, default=64, metavar="N", help="images drawn at once (default: 64)")
    add("--samples-per-shard", type=int, default=256, metavar="N", help="(default: 256)")
    add("--seed", type=int, default=0, metavar="N", help="decides images, with their keys (0)")
    asked = parser.parse_args(arguments)
    speak()
    how = Drawing(
        Sampling(asked.temperature, guidance_scale=asked.guidance_scale),
        asked.seed,
        asked.batch,
        asked.real_share,
        asked.num_samples,
        asked.samples_per_shard,
    )
    try:
        if found := how.problems():
            raise ValueError("; ".join(found))
        with stage("checking the shards"):
            real = real_images(asked.shards, asked.out)  # before the weights are read
        with stage("loading the weights"):
            backbone = load_backbone(asked.family, asked.weights).eval().to(asked.device)
        index = draw_shards(backbone, asked.weights, real, asked.out, how)
    except (ValueError, OSError) as error:  # OSError: a full disk; finished shards are kept
        parser.exit(1, f"{error}\n")
    folder = asked.out.parent if asked.out.name == "codes" else asked.out
    print(f"{asked.out}: {index.num_samples:,} samples; train with data=shards data.data_dir={folder}")


if __name__ == "__main__":
    main()
