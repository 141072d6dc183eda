"""Writing shards of captioned images or image codes, and the hashed index that lies beside them.

A shard is a tar file of samples; sample ``k`` is the group of files ``k.image_ids.npy`` (H, W) int32 or
``k.png``, ``k.txt`` (caption) and ``k.json`` (size, concept, view, checksum). ``index.json`` names every
shard with its sha256 and count, so that loss and damage are seen before and while training. Source: ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
PAYLOAD = {"codes": "image_ids.npy", "raw": "png"}


@dataclass(frozen=True)
class Shard:
    """One tar file: `name` inside the folder, sha256 and size of the file, number of samples in it."""

    name: str
    sha256: str
    num_bytes: int
    num_samples: int


@dataclass(frozen=True)
class ShardMeta:
    """What all samples of a folder share.

    Args:
        kind: "codes" (image ids) or "raw" (PNG).
        split: "train" or "val".
        source: Name of the data set, e.g. "emoji".
        height: Rows of an image: codes for "codes", pixels for "raw".
        width: Columns, likewise.
        attribution: Licence line of the pictures.
        inputs_hash: Hash of everything the shards were made from; another hash means they are stale.
        num_codes: Size of the codebook ("codes" only).
        tokenizer_hash: Identity of the image tokenizer ("codes" only).
    """

    kind: str
    split: str
    source: str
    height: int
    width: int
    attribution: str
    inputs_hash: str
    num_codes: int | None = None
    tokenizer_hash: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The index of a folder of shards."""

    folder: Path
    meta: ShardMeta
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """Read and check ``folder/index.json``.

        Raises:
            ValueError: The index is missing, unreadable, of another format, or names something that is
                not a plain file of the folder (a path or a ``pipe:`` address).
        """
        path = Path(folder) / INDEX_NAME
        if not path.is_file():
            raise ValueError(
                f"No shards in {folder}: {INDEX_NAME} is missing; build them with "
                "`python -m sjd2_lightning.data.prepare` or correct data.data_dir."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format_version") != FORMAT_VERSION:
                raise KeyError("format_version")
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            meta = ShardMeta(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no index of format {FORMAT_VERSION} ({error!r}); "
                "delete the folder and build it again."
            ) from error
        for shard in shards:
            if Path(shard.name).name != shard.name or ":" in shard.name or not shard.name.endswith(".tar"):
                raise ValueError(
                    f"{path} names the shard {shard.name!r}, which is not a .tar file of this folder."
                )
        return cls(Path(folder), meta, shards)

    def check_files(self) -> None:
        """Raise ValueError naming every shard of the index that is not in the folder."""
        missing = [shard.name for shard in self.shards if not (self.folder / shard.name).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of the {len(self.shards)} shards its index names: "
                f"{', '.join(missing[:5])}; restore them, or delete the folder so that it is built again."
            )

    def damaged_shards(self) -> list[str]:
        """Names of the shards whose content is not what was written (size or sha256 differs)."""
        return [
            shard.name
            for shard in self.shards
            if (self.folder / shard.name).stat().st_size != shard.num_bytes
            or file_sha256(self.folder / shard.name) != shard.sha256
        ]

    def check_model(self, num_codes: int | None, tokenizer_hash: str | None) -> None:
        """Raise ValueError if the codes were made by another tokenizer than the model decodes with.

        Args:
            num_codes: Codebook size of the model; None skips this check.
            tokenizer_hash: Identity of the model's image tokenizer; None skips this check.
        """
        if num_codes is not None and self.meta.num_codes != num_codes:
            raise ValueError(
                f"{self.folder} holds codes of a codebook of {self.meta.num_codes}, "
                f"the model has {num_codes}; "
                "choose the data made for this model, or prepare them again with its tokenizer."
            )
        if tokenizer_hash is not None and self.meta.tokenizer_hash != tokenizer_hash:
            raise ValueError(
                f"{self.folder} was made with image tokenizer {str(self.meta.tokenizer_hash)[:12]}, "
                f"the model has {tokenizer_hash[:12]}; "
                "choose the data made for this model, or prepare them again with its tokenizer."
            )


def write_shards(
    samples: Iterable[Mapping[str, Any]], folder: str | Path, samples_per_shard: int, meta: ShardMeta
) -> ShardIndex:
    """Write samples to tar shards and their index; the folder appears complete or not at all (ours).

    Args:
        samples: Mappings with `key` (no dot, no slash), `caption`, `concept`, `view`, `size` (height, width
            in pixels) and `image_ids` (H, W) integers or, for kind "raw", `image` (H, W, 3) uint8.
        folder: Where the shards go; what lies there is replaced once the new shards are complete.
        samples_per_shard: Samples in every shard but the last.
        meta: What the samples share; goes into the index.

    Returns:
        The index of the written folder.

    Raises:
        ValueError: A sample does not fit `meta`, a key repeats, or there is no sample.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        building.chmod(0o755)
        shards = []
        files = _checked_files(samples, meta)
        for number in itertools.count():
            chunk = list(itertools.islice(files, samples_per_shard))
            if not chunk:
                break
            shards.append(_write_shard(building / f"{meta.split}-{number:05d}.tar", chunk))
        if not shards:
            raise ValueError(f"No samples to write to {folder}; check the selection of the data set.")
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(meta)}
        content["shards"] = [dataclasses.asdict(shard) for shard in shards]
        (building / INDEX_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _replace_folder(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ShardIndex(folder, meta, tuple(shards))


def payload_checksum(payload: bytes, caption: bytes) -> int:
    """CRC-32 of a sample's content: a flipped byte inside a tar is noticed by nothing else."""
    return zlib.crc32(caption, zlib.crc32(payload))


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked_files(samples: Iterable[Mapping[str, Any]], meta: ShardMeta) -> Iterator[dict[str, Any]]:
    seen = set()
    for sample in samples:
        key = sample["key"]
        if not key or key in seen or set(key) & set("./\\") or key.startswith("__"):
            raise ValueError(
                f"Sample key {key!r} is empty, repeats, or has a dot or slash; make keys plain and unique."
            )
        seen.add(key)
        payload = _encode_codes(sample, meta) if meta.kind == "codes" else _encode_image(sample, meta)
        caption = sample["caption"].encode()
        fields = {"size": list(sample["size"]), "concept": sample["concept"], "view": sample["view"]}
        fields["crc32"] = payload_checksum(payload, caption)
        yield {
            "__key__": key,
            PAYLOAD[meta.kind]: payload,
            "txt": caption,
            "json": json.dumps(fields).encode(),
        }


def _encode_codes(sample: Mapping[str, Any], meta: ShardMeta) -> bytes:
    image_ids = np.asarray(sample["image_ids"])
    low, high = int(image_ids.min()), int(image_ids.max())
    if image_ids.shape != (meta.height, meta.width) or low < 0 or high >= (meta.num_codes or 0):
        raise ValueError(
            f"Sample {sample['key']} has codes of shape {image_ids.shape} in [{low}, {high}]; "
            f"the folder is for {(meta.height, meta.width)} in [0, {meta.num_codes})."
        )
    buffer = io.BytesIO()
    np.save(buffer, image_ids.astype(np.int32), allow_pickle=False)
    return buffer.getvalue()


def _encode_image(sample: Mapping[str, Any], meta: ShardMeta) -> bytes:
    image = sample["image"]
    if image.shape != (meta.height, meta.width, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"Sample {sample['key']} is an image {image.shape} {image.dtype}; expected "
            f"{(meta.height, meta.width, 3)} uint8."
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_shard(path: Path, files: list[dict[str, Any]]) -> Shard:
    # mtime=0: the same samples give the same bytes, so the same sha256
    with path.open("wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as writer:
        for sample in files:
            writer.write(sample)
    return Shard(path.name, file_sha256(path), path.stat().st_size, len(files))


def _replace_folder(new: Path, folder: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
