"""Writing one shard: checked samples in, the same bytes for the same samples out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from sjd2_lightning.data.index import KEY, PAYLOAD, Shard, ShardMeta, payload_checksum
from sjd2_lightning.run.files import sha256_of_file, whole_file

SampleFields = Mapping[str, Any]  # key, caption, image_ids or image; the rest goes into its .json


def write_shard(path: Path, samples: Iterable[SampleFields], meta: ShardMeta) -> Shard:
    """Write samples to a tar file that appears complete or not at all.

    Args:
        path: the file; what lies there is replaced.
        samples: mappings with `key` (letters, digits, - and _), `caption`, and `image_ids` (H, W) integers
            or, for kind "raw", `image` (H, W, 3) uint8; what else they hold is kept in the sample's .json.
        meta: what the samples of the folder share.

    Returns:
        The entry of the index.

    Raises:
        ValueError: A sample does not fit `meta`, or a key repeats.
    """
    ranges: list[tuple[int, int]] = []
    seen: set[str] = set()
    # mtime=0: the same samples give the same bytes, so the same sha256
    with whole_file(path) as part:
        with part.open("wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as writer:
            for sample in samples:
                key = sample["key"]
                if key in seen or not KEY.fullmatch(key):
                    raise ValueError(
                        f"Sample key {key!r} repeats, or is not of 1 to 80 letters, digits, '-' and '_'; "
                        "make keys plain and unique"
                    )
                seen.add(key)
                writer.write(_fields(sample, meta, ranges))
        return Shard(path.name, sha256_of_file(part), part.stat().st_size, len(seen), _union(ranges))


def _fields(sample: SampleFields, meta: ShardMeta, ranges: list[tuple[int, int]]) -> dict[str, Any]:
    """The files of a sample; appends the range of its codes."""
    key, caption = sample["key"], sample["caption"].encode()
    codes = meta.kind == "codes"
    payload = _encode_codes(sample, meta, ranges) if codes else _encode_image(sample, meta)
    facts = {
        name: value for name, value in sample.items() if name not in ("key", "caption", "image", "image_ids")
    }
    if codes:
        facts["tokenizer"] = meta.tokenizer_hash
    facts["crc32"] = payload_checksum(key, payload, caption)
    return {"__key__": key, PAYLOAD[meta.kind]: payload, "txt": caption, "json": json.dumps(facts).encode()}


def _encode_codes(sample: SampleFields, meta: ShardMeta, ranges: list[tuple[int, int]]) -> bytes:
    image_ids = np.asarray(sample["image_ids"])
    low, high = int(image_ids.min()), int(image_ids.max())
    if image_ids.shape != (meta.height, meta.width) or low < 0 or high >= (meta.num_codes or 0):
        raise ValueError(
            f"Sample {sample['key']} has codes of shape {image_ids.shape} in [{low}, {high}]; "
            f"the folder is for {(meta.height, meta.width)} in [0, {meta.num_codes})."
        )
    ranges.append((low, high))
    buffer = io.BytesIO()
    np.save(buffer, image_ids.astype("<i4"), allow_pickle=False)
    return buffer.getvalue()


def _encode_image(sample: SampleFields, meta: ShardMeta) -> bytes:
    image = sample["image"]
    if image.shape != (meta.height, meta.width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"Sample {sample['key']} is an image {image.shape} {image.dtype}; expected "
            f"{(meta.height, meta.width, 3)} uint8"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _union(ranges: list[tuple[int, int]]) -> tuple[int, int] | None:
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
