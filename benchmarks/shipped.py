"""Held-out prompts and size of the shipped model, whichever that is, from the configuration."""

from __future__ import annotations

from functools import cache

from sjd2_lightning.cli.build import build_prompts
from sjd2_lightning.cli.launch import composed
from sjd2_lightning.config.reading import evaluate_config
from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.evaluation.prompts import PromptItem


@cache
def shipped_settings() -> EvaluateConfig:
    """The configuration of `evaluate.py` as it is without any key."""
    return evaluate_config(composed("evaluate", []))


def shipped_prompts(num_prompts: int) -> list[PromptItem]:
    """The first held-out prompts of the data that the shipped model was trained on."""
    return build_prompts(shipped_settings(), num_prompts)


def shipped_pixels() -> int:
    """Height and width of the pictures of the shipped model."""
    return shipped_settings().model.image_size[0]
