"""The index that lies beside the shards of captioned images or image codes.

A shard is a tar file of samples; sample ``k`` is the group of files ``k.image_ids.npy`` (H, W) int32 or
``k.png``, ``k.txt`` (caption) and ``k.json`` (size, tokenizer, checksum, ...). ``index.json`` names every
shard with its sha256, count and range of codes, so that loss and damage are seen before and while training.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd2_lightning.data.places import Place, RemotePath, num_bytes, place
from sjd2_lightning.run.files import sha256_of_file, write_whole

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
PROMPTS_NAME = "prompts.json"  # captions of held-out pictures, beside the folders of kinds
HELD_OUT_NAME = "held_out"  # folder of such pictures, there too
PAYLOAD = {"codes": "image_ids.npy", "raw": "png"}
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # of samples: a name of files in plain tar headers


@dataclass(frozen=True)
class Shard:
    """One tar file: `name` inside the folder, sha256 and size of the file, number of samples in it.

    `code_range` is the least and the greatest code in it ("codes" only).
    """

    name: str
    sha256: str
    num_bytes: int
    num_samples: int
    code_range: tuple[int, int] | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Shard:
        """From what JSON holds of one; raises TypeError or ValueError if that is something else."""
        if fields.get("code_range") is not None:
            low, high = fields["code_range"]
            fields = fields | {"code_range": (int(low), int(high))}
        shard = cls(**fields)
        numbers = (shard.num_bytes, shard.num_samples)
        plain = all(type(number) is int and number >= 0 for number in numbers)
        if not plain or not isinstance(shard.name, str) or not isinstance(shard.sha256, str):
            raise TypeError(f"shard {fields}")
        return shard


@dataclass(frozen=True)
class ShardMeta:
    """What all samples of a folder share.

    Args:
        kind: "codes" (image ids) or "raw" (PNG).
        split: "train" or "val".
        source: name of the data set, e.g. "emoji".
        height: rows of an image: codes for "codes", pixels for "raw".
        width: columns, likewise.
        attribution: licence line of the pictures.
        inputs_hash: hash of everything the shards were made from; another hash means they are stale.
        num_codes: size of the codebook ("codes" only).
        tokenizer_hash: identity of the image tokenizer ("codes" only).
        tokenizer: where that tokenizer was read from, for people.
        transform: how pictures were brought to size.
        pixel_size: height and width of the pictures in pixels.
        num_skipped: pictures of the source that could not be used.
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
    tokenizer: str | None = None
    transform: str | None = None
    pixel_size: tuple[int, int] | None = None
    num_skipped: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """The index of a folder of shards."""

    folder: Place
    meta: ShardMeta
    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @classmethod
    def load(cls, folder: str | Place) -> ShardIndex:
        """Read and check ``folder/index.json``.

        Raises:
            ValueError: the index is missing, unreadable, of another format, or names something that is
                not a plain file of the folder (a path or a ``pipe:`` address).
        """
        folder = place(folder)
        path = folder / INDEX_NAME
        if not path.is_file():
            raise ValueError(
                f"No shards in {folder}: {INDEX_NAME} is missing; build them with "
                "`sjd2 prepare` or correct data.data_dir"
            )
        try:
            with path.open("rb") as stream:
                content = json.loads(stream.read())
            if content.pop("format_version") != FORMAT_VERSION:
                raise KeyError("format_version")
            shards = tuple(Shard.of(fields) for fields in content.pop("shards"))
            if content.get("pixel_size") is not None:
                content["pixel_size"] = tuple(content["pixel_size"])
            meta = ShardMeta(**content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no index of format {FORMAT_VERSION} ({error!r}); "
                "delete the folder and build it again"
            ) from error
        for shard in shards:
            if Path(shard.name).name != shard.name or ":" in shard.name or not shard.name.endswith(".tar"):
                raise ValueError(
                    f"{path} names the shard {shard.name!r}, which is not a .tar file of this folder"
                )
        return cls(folder, meta, shards)

    def save(self, folder: Path) -> None:
        """Write ``folder/index.json``, at once."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self.meta)}
        content["shards"] = [dataclasses.asdict(shard) for shard in self.shards]
        write_whole(folder / INDEX_NAME, json.dumps(content, indent=1) + "\n")

    def check_codes(self) -> None:
        """Raise ValueError if the folder holds pictures in place of codes."""
        if self.meta.kind != "codes":
            raise ValueError(f"{self.folder} holds pictures, not codes; encode them by `sjd2 prepare`")

    def check_files(self) -> None:
        """Raise ValueError naming every shard of the index that is not in the folder."""
        missing = [shard.name for shard in self.shards if not (self.folder / shard.name).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of the {len(self.shards)} shards its index names: "
                f"{', '.join(missing[:5])}; restore them, or delete the folder so that it is built again"
            )

    def damaged_shards(self) -> list[str]:
        """Names of the shards that are not what was written: by sha256, in an object store by size alone."""
        return [
            shard.name
            for shard in self.shards
            for path in [self.folder / shard.name]
            if num_bytes(path) != shard.num_bytes
            or (not isinstance(path, RemotePath) and sha256_of_file(path) != shard.sha256)
        ]

    def check_model(
        self, num_codes: int | None, tokenizer_hash: str | None, size: tuple[int, int] | None = None
    ) -> None:
        """Raise ValueError if the shards do not fit the model: another tokenizer, or another size.

        Args:
            num_codes: codebook size of the model; None skips this check.
            tokenizer_hash: identity of the model's image tokenizer; None skips this check.
            size: height and width of its images, in codes for "codes", in pixels for "raw"; None skips it.
        """
        remedy = "choose the data made for this model, or prepare them again with its tokenizer."
        if self.meta.kind == "codes" and num_codes is not None and self.meta.num_codes != num_codes:
            raise ValueError(
                f"{self.folder} holds codes of a codebook of {self.meta.num_codes}, "
                f"the model has {num_codes}; {remedy}"
            )
        if (
            self.meta.kind == "codes"
            and tokenizer_hash is not None
            and self.meta.tokenizer_hash != tokenizer_hash
        ):
            raise ValueError(
                f"{self.folder} was made with image tokenizer {str(self.meta.tokenizer_hash)[:12]}, "
                f"the model has {tokenizer_hash[:12]}; {remedy}"
            )
        if size is not None and (self.meta.height, self.meta.width) != tuple(size):
            unit = "codes" if self.meta.kind == "codes" else "pixels"
            raise ValueError(
                f"{self.folder} holds images of {self.meta.height}x{self.meta.width} {unit}, the model draws "
                f"{size[0]}x{size[1]}; prepare them again with --image-size, or change model.image_size"
            )


def payload_checksum(key: str, payload: bytes, caption: bytes) -> int:
    """CRC-32 of a sample's content: a flipped byte inside a tar is noticed by nothing else."""
    return zlib.crc32(caption, zlib.crc32(payload, zlib.crc32(key.encode())))
