"""Scenes in an evaluation: prompts that say what they ask for, real scenes, and the judge of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from sjd2_lightning.data.sources.scene_captions import read_caption
from sjd2_lightning.data.sources.scene_pixels import GROUND_COLOURS, cut_outs
from sjd2_lightning.data.sources.scenes import ALL, PROMPT_CATEGORIES, Scene, Variety, held_out_scenes
from sjd2_lightning.evaluation.prompts import PromptItem, seed_of
from sjd2_lightning.evaluation.references import ReferenceSet
from sjd2_lightning.metrics.judge import NAMES, Asked, Judge

MOST_PROMPTS = 10_000


def scene_judge(size: int) -> Judge:
    """The judge of scenes of `size` x `size` pixels; it knows all their pictures and grounds."""
    pictures = {noun: np.asarray(picture) for noun, picture in cut_outs().items()}
    return Judge(pictures, GROUND_COLOURS, size)


def scene_prompts(num_prompts: int, seed: int = 0, variety: Variety = ALL) -> list[PromptItem]:
    """Captions of held-out scenes with what they ask for, the categories in turn; see `_in_turn`.

    Raises:
        ValueError: more are asked for than can be made in seconds.
    """
    if not 0 < num_prompts <= MOST_PROMPTS:
        raise ValueError(
            f"num_prompts is {num_prompts}: ask for 1 to {MOST_PROMPTS} scenes; more images of each are "
            "drawn with samples_per_prompt"
        )
    return [
        PromptItem(scene.key, scene.caption, seed_of(scene.key, seed), Asked.of(scene.facts()))
        for scene in _in_turn(num_prompts, seed, variety)
    ]


def scene_reference(size: int, num_scenes: int, seed: int = 0, variety: Variety = ALL) -> ReferenceSet:
    """The scenes whose captions are the first so many prompts, `size` pixels wide and high."""
    scenes = _in_turn(num_scenes, seed, variety)
    return ReferenceSet(
        "held-out scenes",
        tuple(scene.key for scene in scenes),
        tuple(scene.caption for scene in scenes),
        torch.from_numpy(np.stack([scene.image(size) for scene in scenes])),
        reading="painted",
        asked=tuple(Asked.of(scene.facts()) for scene in scenes),
    )


def with_asked(prompts: Sequence[PromptItem]) -> list[PromptItem]:
    """Prompts of any origin, those that the scenes' grammar can read with what they ask for."""
    found = []
    for item in prompts:
        read = read_caption(item.prompt, tuple(GROUND_COLOURS))
        asked = None if read is None else Asked.of({"category": read.category, **read.plain()})
        found.append(replace(item, asked=asked))
    return found


@lru_cache(maxsize=4)
def _in_turn(number: int, seed: int, variety: Variety) -> tuple[Scene, ...]:
    """Held-out scenes, equally many of each category, so that any first part has all of them.

    The names that training never shows are left out where it shows only some nouns: most are unknown then.
    """
    per_category = -(-number // (len(PROMPT_CATEGORIES) - (variety.num_nouns is not None)))
    scenes = held_out_scenes(per_category, seed, variety)
    if variety.num_nouns is not None:
        scenes = [scene for scene in scenes if scene.category != NAMES]
    return tuple(scene for start in range(per_category) for scene in scenes[start::per_category])[:number]
