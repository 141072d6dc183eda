"""Reading shards: checked samples out of tar files that may be damaged.

WebDataset's stages, in our own composition: only local files are opened, only an allow-list of formats is
decoded, every sample is checked, and what cannot be used is skipped, recorded and bounded. Source: ours.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from sjd2_lightning.data.plan import Segment
from sjd2_lightning.data.shards import PAYLOAD, ShardIndex, payload_checksum

wds.utils.enforce_security = True  # in case webdataset was imported before this package


class BadDataError(ValueError):
    """More samples are unusable than the run allows."""


class Sample(NamedTuple):
    """A captioned image as codes; image_ids is (H, W) int64."""

    key: str
    caption: str
    image_ids: Tensor


class RawSample(NamedTuple):
    """A captioned image as pixels; image is (h, w, 3) uint8."""

    key: str
    caption: str
    image: np.ndarray


class SkippedSample(NamedTuple):
    """A sample, or a run of samples, that could not be used, and why."""

    shard: str
    key: str
    reason: str
    num_samples: int = 1

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


class SkipLog:
    """The samples one reader skipped, each counted once however often it is met."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._new: list[SkippedSample] = []
        self.num_samples = 0

    def add(self, skipped: SkippedSample) -> None:
        """Record a skipped sample unless it is known already."""
        if (skipped.shard, skipped.key) not in self._seen:
            self._seen.add((skipped.shard, skipped.key))
            self._new.append(skipped)
            self.num_samples += skipped.num_samples

    def drain(self) -> tuple[SkippedSample, ...]:
        """What was recorded since the last call."""
        new, self._new = tuple(self._new), []
        return new


def make_pipeline(
    index: ShardIndex,
    segments: Sequence[Segment],
    log: SkipLog,
    shuffle_buffer: int = 0,
    rng: Random | None = None,
) -> Iterable[Any]:
    """The samples of some segments of an index, checked, optionally shuffled through a buffer.

    Args:
        index: The folder to read.
        segments: What to read, in order.
        log: Where skipped samples are recorded.
        shuffle_buffer: Samples among which the next one is drawn; 0 keeps the order.
        rng: Source of the shuffle; required with a buffer.

    Returns:
        An iterable of `Sample` (kind "codes") or `RawSample` (kind "raw").
    """

    def read() -> Iterator[Sample | RawSample]:
        for segment in segments:
            yield from _read_segment(index, segment, log)

    stages: list[Any] = [read]
    if shuffle_buffer > 1:
        stages.append(wds.shuffle(shuffle_buffer, initial=shuffle_buffer, rng=rng))
    return wds.DataPipeline(*stages)


def read_all(folder: str, max_bad_samples: int = 0) -> Iterator[Any]:
    """Every sample of a folder of shards in its order; for building statistics and for looking at data.

    Raises:
        BadDataError: More than `max_bad_samples` samples are unusable.
        ValueError: The index or a shard is missing.
    """
    index, log = ShardIndex.load(folder), SkipLog()
    index.check_files()
    whole = [Segment(number, 0, shard.num_samples) for number, shard in enumerate(index.shards)]
    yield from make_pipeline(index, whole, log)
    skipped = log.drain()
    if log.num_samples > max_bad_samples:
        raise BadDataError(
            f"{log.num_samples} samples of {folder} are unusable, {max_bad_samples} are allowed, "
            f"e.g. {skipped[0]}; restore the shards, or delete the folder so that it is built again."
        )


def _read_segment(index: ShardIndex, segment: Segment, log: SkipLog) -> Iterator[Sample | RawSample]:
    """Samples start..stop-1 of a shard; what the tar no longer holds is recorded as skipped."""
    path = index.folder / index.shards[segment.shard].name
    errors: list[str] = []

    def note(error: Exception) -> bool:
        errors.append(f"{type(error).__name__}: {error.args[0] if error.args else ''}")
        return True  # go on: the loss shows up in the count below

    num_read, last_key = 0, "the start of the shard"
    with ExitStack() as stack:
        sources = []
        try:
            sources.append({"url": path.name, "stream": stack.enter_context(path.open("rb"))})
        except OSError as error:
            errors.append(str(error))
        members = tar_file_expander(sources, handler=note)
        for fields in islice(group_by_keys(members, handler=note), segment.stop):
            num_read += 1
            last_key = fields["__key__"]
            if num_read <= segment.start:
                continue
            try:
                sample = _decode(fields, index)
            except ValueError as error:
                log.add(SkippedSample(path.name, last_key, str(error)))
            else:
                yield sample
    if num_read < segment.stop:
        first = max(num_read, segment.start)
        reason = f"unreadable after {last_key} ({errors[-1] if errors else 'the archive ends early'})"
        key = f"samples {first} to {segment.stop - 1}"
        log.add(SkippedSample(path.name, key, reason, segment.stop - first))


def _decode(fields: dict[str, Any], index: ShardIndex) -> Sample | RawSample:
    """A checked sample from the bytes of its files; ValueError says what is wrong with it.

    Only JSON, UTF-8, .npy without pickles and PNG are understood.
    """
    wanted = PAYLOAD[index.meta.kind]
    missing = [name for name in (wanted, "txt", "json") if not fields.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing or empty")
    payload, caption = fields[wanted], fields["txt"]
    facts = json.loads(fields["json"])
    if not isinstance(facts, dict) or facts.get("crc32") != payload_checksum(payload, caption):
        raise ValueError("its checksum does not fit its content")
    key, text = fields["__key__"], caption.decode()
    if index.meta.kind == "codes":
        return Sample(key, text, _decode_codes(payload, index))
    return RawSample(key, text, _decode_image(payload, index))


def _decode_codes(payload: bytes, index: ShardIndex) -> Tensor:
    try:
        image_ids = np.load(io.BytesIO(payload), allow_pickle=False)
    except (OSError, EOFError, SyntaxError, MemoryError) as error:
        raise ValueError(f"image_ids.npy cannot be read ({error})") from error
    shape, num_codes = (index.meta.height, index.meta.width), index.meta.num_codes or 0
    if not isinstance(image_ids, np.ndarray) or image_ids.dtype != np.int32 or image_ids.shape != shape:
        raise ValueError(f"image_ids.npy is not an int32 array of shape {shape}")
    if image_ids.min() < 0 or image_ids.max() >= num_codes:
        raise ValueError(f"codes in [{image_ids.min()}, {image_ids.max()}], outside [0, {num_codes})")
    return torch.from_numpy(image_ids.astype(np.int64))


def _decode_image(payload: bytes, index: ShardIndex) -> np.ndarray:
    try:
        image = np.asarray(Image.open(io.BytesIO(payload), formats=("PNG",)).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the PNG cannot be read ({error})") from error
    if image.shape != (index.meta.height, index.meta.width, 3):
        raise ValueError(f"the image is {image.shape}, expected {(index.meta.height, index.meta.width, 3)}")
    return image
