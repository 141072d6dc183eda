"""Prompts to decode, each with its own seed: from the held-out emoji names or from a file.

A prompt's seed depends on its key alone, so a longer list begins with the images of a shorter one.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sjd2_lightning.data.captions import NO_CAPTION, json_of, plain_caption
from sjd2_lightning.data.names import Part, Texts, sample_caption, sample_name, sample_texts
from sjd2_lightning.data.pictures import SUFFIXES
from sjd2_lightning.data.sources.emoji import EmojiImage, load_emoji_index
from sjd2_lightning.data.sources.record import key_of
from sjd2_lightning.data.sources.tars import tar_parts
from sjd2_lightning.metrics.judge import Asked
from sjd2_lightning.models.imagenet import NUM_CLASSES, class_name
from sjd2_lightning.run.files import text_of

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_SHOWN_KEY = "letters, digits, '.', '_' and '-', at most 120"
_NUM_SEEDS = 2**31
_FIELDS = {"prompt", "key", "seed"}
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class PromptItem:
    """One image to decode.

    Attributes:
        key: name of its files.
        prompt: its text.
        seed: seed of all its random numbers.
        asked: what the text asks for, for the judge; None where no judge is at home. It decides no image.
    """

    key: str
    prompt: str
    seed: int
    asked: Asked | None = field(default=None, hash=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the image, as a JSON object."""
        return {"key": self.key, "prompt": self.prompt, "seed": self.seed}


def seed_of(key: str, seed: int = 0) -> int:
    """Seed in [0, 2**31) of a prompt, from its key and the base seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") % _NUM_SEEDS


def held_out_order(seed: int = 0) -> list[EmojiImage]:
    """Held-out pictures, one of every concept before the second of any; the order is the same everywhere."""
    by_concept: dict[str, list[EmojiImage]] = defaultdict(list)
    for item in load_emoji_index():
        if item.split == "val":
            by_concept[item.concept].append(item)
    ranked = []
    for concept, items in by_concept.items():
        place = hashlib.sha256(f"{seed}:{concept}".encode()).hexdigest()
        # The shortest name is the one without skin tone, hair and gender.
        for round_idx, item in enumerate(sorted(items, key=lambda item: (len(item.caption), item.key))):
            ranked.append((round_idx, place, item))
    return [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])]


def held_out_prompts(num_prompts: int | None = None, seed: int = 0) -> list[PromptItem]:
    """The first `num_prompts` (None: all) held-out emoji names, spread over concepts.

    Raises:
        ValueError: there are fewer.
    """
    found = held_out_order(seed)
    if num_prompts is None:
        num_prompts = len(found)
    if not 0 < num_prompts <= len(found):
        raise ValueError(
            f"num_prompts is {num_prompts}, but there are {len(found)} held-out emoji names; "
            f"ask for 1..{len(found)} and use samples_per_prompt for more images"
        )
    return [PromptItem(item.key, item.caption, seed_of(item.key, seed)) for item in found[:num_prompts]]


def class_prompts(num_prompts: int, seed: int = 0) -> list[PromptItem]:
    """The first `num_prompts` classes of ImageNet in an order that is the same everywhere, by name.

    Raises:
        ValueError: there are fewer.
    """
    if not 0 < num_prompts <= NUM_CLASSES:
        raise ValueError(
            f"num_prompts is {num_prompts}, but there are {NUM_CLASSES} classes; ask for 1..{NUM_CLASSES} "
            "and use samples_per_prompt for more images"
        )
    order = sorted(
        range(NUM_CLASSES), key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).digest()
    )
    keys = [(f"class-{number:03d}", class_name(number)) for number in order[:num_prompts]]
    return [PromptItem(key, name, seed_of(key, seed)) for key, name in keys]


def repeat_prompts(prompts: Sequence[PromptItem], samples_per_prompt: int) -> list[PromptItem]:
    """Every prompt with `samples_per_prompt` seeds; the first repeat keeps key and seed.

    Raises:
        ValueError: `samples_per_prompt` is below 1.
    """
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt is {samples_per_prompt}; it must be at least 1")
    repeated = list(prompts)
    for repeat in range(1, samples_per_prompt):
        for item in prompts:
            key = repeat_key(item.key, repeat)
            repeated.append(replace(item, key=key, seed=seed_of(key, item.seed)))
    return repeated


def repeat_key(key: str, repeat: int) -> str:
    """Key of a prompt's further sample; the first one, number 0, keeps the key."""
    return f"{key}-r{repeat}" if repeat else key


def read_prompts(path: str | Path, seed: int = 0) -> list[PromptItem]:
    """Prompts of a file: `.txt`, one a line, `.json`, a list of strings or objects, `.jsonl`, one of them a
    line, `.tsv`, a table with a column `Prompt` (PartiPrompts), or a WebDataset `.tar`, which may be
    compressed.

    An object has `prompt` and may have `key` and `seed`. Without a key a prompt is named by its place, and
    must not occur twice; rows of a table are always named so. A sample of a tar file has
    such an object in `.json`, or its text in `.txt`, or a `caption` in `.json`; without a key it is named by
    its files.

    Raises:
        ValueError: the file is missing, unreadable, or holds an unusable prompt.
    """
    path = Path(path)
    is_tar = path.name.lower().endswith(_TARS)
    if not is_tar and path.suffix.lower() not in (".txt", ".json", ".jsonl", ".tsv"):
        raise ValueError(f"prompt file {path}: its name must end in .txt, .json, .jsonl, .tsv or .tar")
    try:
        entries: Any = _tar_entries(path) if is_tar else _text_entries(path)
    except (OSError, ValueError) as error:  # undecodable text, broken JSON or tar
        raise ValueError(f"prompt file {path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"prompt file {path}: expected a JSON list, found {type(entries).__name__}")
    prompts = [_entry(entry, place, seed, path) for place, entry in enumerate(entries)]
    check_prompts(prompts)
    unnamed = [
        item.prompt
        for item, entry in zip(prompts, entries, strict=True)
        if isinstance(entry, str) or entry.get("key") is None
    ]
    text, uses = Counter(unnamed).most_common(1)[0] if unnamed else ("", 0)
    if uses > 1:
        raise ValueError(
            f"prompt file {path}: {text!r} occurs {uses} times; leave it once and ask for more images with "
            "samples_per_prompt, or give each its own key"
        )
    return prompts


def check_prompts(prompts: Sequence[PromptItem]) -> None:
    """Refuses a list that cannot be decoded.

    Raises:
        ValueError: no prompts, an empty one, a key that is no file name or occurs twice, a bad seed.
    """
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    for item in prompts:
        if not item.prompt.strip():
            raise ValueError(f"prompt {item.key!r} is empty; give it a text or remove it")
        if not _KEY.fullmatch(item.key):
            raise ValueError(f"prompt key {item.key!r} cannot name a file; use {_SHOWN_KEY} characters")
        if not 0 <= item.seed < 2**63:
            raise ValueError(f"prompt {item.key!r} has seed {item.seed}; use 0 or a positive 63-bit number")
    # Files of two keys that differ in case alone would be one file on some systems.
    key, uses = Counter(item.key.lower() for item in prompts).most_common(1)[0]
    if uses > 1:
        raise ValueError(f"prompt key {key!r} occurs {uses} times (case aside); every prompt needs its own")


def _text_entries(path: Path) -> Any:
    content = path.read_bytes()
    if path.suffix.lower() == ".json":
        return json_of(content)
    lines = text_of(content).replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    if path.suffix.lower() == ".tsv":
        return _rows(lines)
    if path.suffix.lower() == ".jsonl":
        return [json_of(line.encode()) for line in lines if line.strip()]
    return lines


def _rows(lines: list[str]) -> list[dict[str, str]]:
    """Prompts of a table whose fields are parted by tabs; quotation marks are part of the text."""
    names = [name.strip().lower() for name in lines[0].split("\t")]
    if "prompt" not in names:
        raise ValueError(f"its first line names no column `Prompt`, but {', '.join(names)}")
    found = []
    for number, line in enumerate(lines[1:]):
        fields = line.split("\t")
        if not names.index("prompt") < len(fields) <= len(names):  # empty ones at the end may be cut off
            raise ValueError(f"line {number + 2} has {len(fields)} fields, and the first line {len(names)}")
        found.append({"prompt": fields[names.index("prompt")], "key": f"{number:05d}"})
    return found


def _tar_entries(path: Path) -> list[Any]:
    """Entries of a WebDataset file, a sample each."""
    samples: dict[str, dict[str, Part]] = {}
    lost: list[tuple[int, str]] = []
    for part in tar_parts(path, lost, packed=True):
        if (named := sample_name(part.name)) is not None:
            samples.setdefault(named[0], {})[named[1]] = part
    if lost:
        raise ValueError(f"byte {lost[0][0]}: {lost[0][1]}; copy it again")
    entries = []
    for sample, files in samples.items():
        texts = sample_texts(files)
        for middle in dict.fromkeys(middle for middle, _ in texts):
            name = f"{sample}.{middle}" if middle else sample
            try:
                entries.append({"key": _tar_key(name), **_sample_entry(texts, middle)})
            except ValueError as error:
                raise ValueError(f"sample {name}: {error}") from error
        if not texts and any(f".{suffix.lower()}" in SUFFIXES for suffix in files):
            entries.append({"key": _tar_key(sample), "prompt": ""})  # refused with the empty ones
    return entries


def _sample_entry(texts: Texts, middle: str) -> dict[str, Any]:
    """The object with `prompt` in a sample's .json, else the caption in its .txt or .json; "" without one."""
    fields = texts.get((middle, ".json"))
    facts = json_of(fields.read()) if fields else None
    facts = facts if isinstance(facts, dict) else {}
    is_alone = facts.keys() <= _FIELDS or (middle, ".txt") not in texts
    if is_alone and isinstance(facts.get("prompt"), str):
        return facts
    try:
        return {"prompt": sample_caption(texts, middle)}
    except ValueError as error:
        if str(error) != NO_CAPTION:
            raise
        return {"prompt": ""}


def _tar_key(name: str) -> str:
    """Key of a tar's sample: its name, with a hash in place of what cannot name a file."""
    plain = name.strip("./").replace("/", "-")
    return plain if _KEY.fullmatch(plain) else key_of(f"{name} ")


def _entry(entry: Any, place: int, seed: int, path: Path) -> PromptItem:
    where = f"prompt file {path}: entry {place + 1}"
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{where} is neither a text nor an object with `prompt`")
    if unknown := sorted(set(entry) - _FIELDS):
        raise ValueError(f"{where} has unknown fields {unknown}")
    given = {name: value for name, value in entry.items() if value is not None}  # null is as good as absent
    key = given.get("key", f"prompt-{place:05d}")
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ValueError(f"{where} has key {key!r}; it must be a text")
    prompt_seed = given.get("seed", seed_of(str(key), seed))
    if isinstance(prompt_seed, bool) or not isinstance(prompt_seed, int):
        raise ValueError(f"{where} has seed {prompt_seed!r}; it must be an integer")
    try:
        prompt = plain_caption(entry["prompt"])
    except ValueError as error:
        if str(error) != NO_CAPTION:
            raise ValueError(f"{where} is {error}") from error
        prompt = ""
    return PromptItem(str(key), prompt, prompt_seed)
