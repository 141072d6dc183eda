"""Reading shards: checked samples out of tar files that may be damaged.

WebDataset's stages, in our own composition: only local files are opened, only an allow-list of formats is
decoded, every sample is checked, and what cannot be used is skipped, recorded and bounded.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from random import Random
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from sjd2_lightning.data.index import KEY, PAYLOAD, ShardIndex, payload_checksum
from sjd2_lightning.data.order import Segment
from sjd2_lightning.data.places import Place

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


AnySample = Sample | RawSample


class SkippedSample(NamedTuple):
    """A sample, or a run of samples, that could not be used, and why: damaged, or too long for a model."""

    shard: str
    key: str
    reason: str
    num_samples: int = 1
    damaged: bool = True

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


class SkipLog:
    """The samples one reader skipped, each met often and kept once; `num_samples` counts damaged ones."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._new: list[SkippedSample] = []
        self.num_samples = 0

    def add(self, skipped: SkippedSample) -> None:
        """Record a skipped sample unless it is known already."""
        if (skipped.shard, skipped.key) not in self._seen:
            self._seen.add((skipped.shard, skipped.key))
            self._new.append(skipped)
            self.num_samples += skipped.num_samples * skipped.damaged

    def drain(self) -> tuple[SkippedSample, ...]:
        """What was recorded since the last call."""
        new, self._new = tuple(self._new), []
        return new


def any_caption(caption: str) -> str:
    """What is wrong with a caption where all are welcome: nothing."""
    return ""


def make_pipeline(
    index: ShardIndex,
    segments: Sequence[Segment],
    log: SkipLog,
    shuffle_buffer: int = 0,
    rng: Random | None = None,
    limit: Callable[[str], str] = any_caption,
) -> Iterable[Any]:
    """The samples of some segments of an index, checked, optionally shuffled through a buffer.

    Args:
        index: the folder to read.
        segments: what to read, in order.
        log: where skipped samples are recorded.
        shuffle_buffer: samples among which the next one is drawn; 0 keeps the order.
        rng: source of the shuffle; required with a buffer.
        limit: from a caption to what makes it too long; "" = nothing.

    Returns:
        An iterable of `Sample` (kind "codes") or `RawSample` (kind "raw").
    """

    def read() -> Iterator[AnySample]:
        for segment in segments:
            yield from _read_segment(index, segment, log, limit)

    stages: list[Any] = [read]
    if shuffle_buffer > 1:
        stages.append(wds.shuffle(shuffle_buffer, initial=shuffle_buffer, rng=rng))
    return wds.DataPipeline(*stages)


def read_all(folder: str | Place, max_bad_samples: int = 0) -> Iterator[Any]:
    """Every sample of a folder of shards in its order; for building statistics and for looking at data.

    Raises:
        BadDataError: more than `max_bad_samples` samples are unusable.
        ValueError: the index or a shard is missing.
    """
    index, log = ShardIndex.load(folder), SkipLog()
    index.check_files()
    whole = [Segment(number, 0, shard.num_samples) for number, shard in enumerate(index.shards)]
    yield from make_pipeline(index, whole, log)
    skipped = log.drain()
    if log.num_samples > max_bad_samples:
        raise BadDataError(
            f"{log.num_samples} samples of {folder} are unusable, {max_bad_samples} are allowed, "
            f"e.g. {skipped[0]}; restore the shards, or delete the folder so that it is built again"
        )


def _read_segment(
    index: ShardIndex, segment: Segment, log: SkipLog, limit: Callable[[str], str]
) -> Iterator[AnySample]:
    """Samples start..stop-1 of a shard; what the tar no longer holds is recorded as skipped."""
    path = index.folder / index.shards[segment.shard].name
    num_read, last_key, error = 0, "the start of the shard", "the archive ends early"
    seen: set[str] = set()
    try:
        with path.open("rb") as stream:
            for key, members in islice(_groups(read_members(stream, _max_bytes(index))), segment.stop):
                num_read, last_key = num_read + 1, key
                if num_read <= segment.start:
                    continue
                try:
                    if key in seen:
                        raise ValueError("a second sample of this key")
                    seen.add(key)
                    sample = _decode(key, members, index)
                except ValueError as problem:
                    log.add(SkippedSample(path.name, key, str(problem)))
                else:
                    if excess := limit(sample.caption):
                        log.add(SkippedSample(path.name, key, f"its caption has {excess}", damaged=False))
                    else:
                        yield sample
    except OSError as problem:
        error = f"{type(problem).__name__}: {problem}"
    if num_read < segment.stop:
        first = max(num_read, segment.start)
        reason = f"unreadable after {last_key} ({error})"
        key = f"samples {first} to {segment.stop - 1}"
        log.add(SkippedSample(path.name, key, reason, segment.stop - first))


def _groups(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Neighbours of one key, which is the name up to the first dot inside its last part."""
    return ((key, list(group)) for key, group in groupby(members, _key_of))


def _key_of(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    bare = name.lstrip(".")
    return folder + slash + name[: len(name) - len(bare)] + bare.partition(".")[0]


def _max_bytes(index: ShardIndex) -> int:
    """More than any file of a sample has."""
    num_cells = index.meta.height * index.meta.width
    return 2**16 + 4 * num_cells  # int32, or three bytes a pixel that PNG may fail to shrink


def _decode(key: str, members: Sequence[Member], index: ShardIndex) -> AnySample:
    """A checked sample from its files; ValueError says what is wrong with it.

    Only JSON, UTF-8, .npy without pickles and PNG are understood.
    """
    if not KEY.fullmatch(key):
        raise ValueError("its name is no plain file name")
    wanted = PAYLOAD[index.meta.kind]
    fields: dict[str, bytes] = {}
    for member in members:
        suffix = member.name[len(key) + 1 :]
        if member.problem:
            raise ValueError(f"{suffix} {member.problem}")
        if suffix not in (wanted, "txt", "json") or suffix in fields:
            raise ValueError(f"it holds {suffix[:80]!r}, which is not part of a sample")
        fields[suffix] = member.data
    missing = [name for name in (wanted, "txt", "json") if not fields.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing or empty")
    payload, caption = fields[wanted], fields["txt"]
    try:
        facts = json.loads(fields["json"])
    except RecursionError as error:
        raise ValueError("its json is nested too deeply") from error
    if not isinstance(facts, dict) or facts.get("crc32") != payload_checksum(key, payload, caption):
        raise ValueError("its checksum does not fit its content")
    text = caption.decode()
    if index.meta.kind == "raw":
        return RawSample(key, text, _decode_image(payload, index))
    if facts.get("tokenizer") != index.meta.tokenizer_hash:
        raise ValueError(f"made by image tokenizer {str(facts.get('tokenizer'))[:12]}, not the index's")
    return Sample(key, text, _decode_codes(payload, index))


def _decode_codes(payload: bytes, index: ShardIndex) -> Tensor:
    stream = io.BytesIO(payload)
    shape, num_codes = (index.meta.height, index.meta.width), index.meta.num_codes or 0
    try:
        # the header first: what it claims decides how much memory reading takes
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another version of the format")
        found = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"image_ids.npy cannot be read ({error})") from error
    if found != (shape, False, np.dtype("<i4")):
        raise ValueError(f"image_ids.npy is not an int32 array of shape {shape}")
    if len(payload) - stream.tell() != 4 * shape[0] * shape[1]:
        raise ValueError("image_ids.npy has another size than its header says")
    image_ids = np.frombuffer(payload, "<i4", offset=stream.tell()).reshape(shape)
    if image_ids.min() < 0 or image_ids.max() >= num_codes:
        raise ValueError(f"codes in [{image_ids.min()}, {image_ids.max()}], outside [0, {num_codes})")
    return torch.from_numpy(image_ids.astype(np.int64))


def _decode_image(payload: bytes, index: ShardIndex) -> np.ndarray:
    size = (index.meta.height, index.meta.width)
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG",)) as picture:
            if picture.size != size[::-1]:  # before its pixels are unpacked
                raise ValueError(
                    f"the image is {picture.height}x{picture.width}, expected {size[0]}x{size[1]}"
                )
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # decoders raise all sorts of errors at damaged bytes
        raise ValueError(f"the PNG cannot be read ({error})") from error


BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file of a tar: its content, or what is wrong with it."""

    name: str
    data: bytes
    problem: str | None = None


def read_members(stream: BinaryIO, max_bytes: int) -> Iterator[Member]:
    """The members of an uncompressed tar, in order.

    Args:
        stream: at the first header.
        max_bytes: larger members are not read.
    """
    while block := stream.read(BLOCK):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            continue  # the end mark, or damage: the next header is looked for block by block
        if not info.isreg():
            yield Member(info.name, b"", "is no regular file")
        elif not 0 <= info.size <= max_bytes:
            yield Member(info.name, b"", f"claims {info.size} bytes, {max_bytes} are the most")
        else:
            data = stream.read(info.size + -info.size % BLOCK)
            short = len(data) < info.size
            yield Member(info.name, b"" if short else data[: info.size], "ends early" if short else None)
