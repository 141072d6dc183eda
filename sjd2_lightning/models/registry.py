"""Families of backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sjd2_lightning.models.hub import WeightsSource
from sjd2_lightning.models.lora import LoraSettings, holds_noisy_adapter
from sjd2_lightning.models.weights import ADAPTER, LoadOptions

if TYPE_CHECKING:
    from sjd2_lightning.models.pretrained import PretrainedBackbone


class Family(NamedTuple):
    """A family's adapter, how it is loaded, and built small with random weights, its contexts of guidance."""

    adapter: type[PretrainedBackbone]
    load: Callable[..., Any]
    shrunken: Callable[..., Any]
    contexts: tuple[str, ...]


def _chameleon() -> Family:
    from sjd2_lightning.models.chameleon import ChameleonBackbone, ChameleonTokens, load_chameleon
    from sjd2_lightning.models.small import shrunken_chameleon

    return Family(ChameleonBackbone, load_chameleon, shrunken_chameleon, ChameleonTokens.CONTEXTS)


def _emu3() -> Family:
    from sjd2_lightning.models.emu3 import Emu3Backbone, Emu3Tokens, load_emu3
    from sjd2_lightning.models.small import shrunken_emu3

    return Family(Emu3Backbone, load_emu3, shrunken_emu3, Emu3Tokens.CONTEXTS)


def _janus() -> Family:
    from sjd2_lightning.models.janus import JanusBackbone, JanusTokens, load_janus
    from sjd2_lightning.models.small import shrunken_janus

    return Family(JanusBackbone, load_janus, shrunken_janus, JanusTokens.CONTEXTS)


def _simple_ar() -> Family:
    from sjd2_lightning.models.shrunken import shrunken_simple_ar
    from sjd2_lightning.models.simple_ar import SimpleARBackbone, SimpleARTokens, load_simple_ar

    return Family(SimpleARBackbone, load_simple_ar, shrunken_simple_ar, SimpleARTokens.CONTEXTS)


def _glm_image() -> Family:
    from sjd2_lightning.models.glm_image import GlmImageBackbone, GlmImageTokens, load_glm_image
    from sjd2_lightning.models.shrunken import shrunken_glm_image

    return Family(GlmImageBackbone, load_glm_image, shrunken_glm_image, GlmImageTokens.CONTEXTS)


def _llamagen() -> Family:
    from sjd2_lightning.models.llamagen import LlamaGenBackbone, LlamaGenTokens, load_llamagen
    from sjd2_lightning.models.shrunken import shrunken_llamagen

    return Family(LlamaGenBackbone, load_llamagen, shrunken_llamagen, LlamaGenTokens.CONTEXTS)


# imported when asked for: names are checked before anything that takes seconds is loaded
FAMILIES: dict[str, Callable[[], Family]] = {
    "chameleon": _chameleon,
    "emu3": _emu3,
    "janus": _janus,
    "simple_ar": _simple_ar,
    "glm_image": _glm_image,
    "llamagen": _llamagen,
}


def family_of(name: str) -> Family:
    """A family by name; raises ValueError with the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model.family {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]()


def load_backbone(
    family: str,
    path: str | Path | WeightsSource,
    trunk: str = "trunk",
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    unconditional: str | None = None,
) -> PretrainedBackbone:
    """Loads a backbone from a local folder, or from the hub or its cache.

    Args:
        family: a key of `FAMILIES`.
        path: the backbone folder, or where its weights are published.
        trunk: its sub-folder with the trunk's weights, or any other path to them.
        dtype: type of the trunk's numbers.
        device: to load straight onto; None is the main memory.
        unconditional: another context of guidance than the family's.

    Raises:
        ValueError: for an unknown family, incomplete weights, or another model's adapter beside them; the
            message says how to get them.
    """
    load = family_of(family).load
    source = path if isinstance(path, WeightsSource) else WeightsSource(path)
    remedy = source.remedy() if source.command() else LoadOptions.remedy
    folder = source.folder()
    backbone = load(folder, trunk, LoadOptions(dtype, device, unconditional, remedy))
    if holds_noisy_adapter(folder / ADAPTER):
        backbone.add_lora(LoraSettings(), folder / ADAPTER)
    backbone.read_corrector(folder)
    return backbone


def build_shrunken(family: str, seed: int = 0, condition: str | None = None) -> PretrainedBackbone:
    """A family's model with its true ids, layout and key names, small and with random weights.

    Args:
        family: a key of `FAMILIES`.
        seed: seed of the weights.
        condition: what it is drawn from, "text" or "class", where the family has both; None is its own.
    """
    shrunken = family_of(family).shrunken
    return shrunken(seed) if condition is None else shrunken(seed, condition=condition)
