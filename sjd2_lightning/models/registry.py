"""Families of backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.chameleon import load_chameleon

Loader = Callable[[str | Path, str, torch.dtype], Backbone]

FAMILIES: dict[str, Loader] = {"chameleon": load_chameleon}


def load_backbone(
    family: str, path: str | Path, trunk: str = "trunk", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Loads a backbone from a local folder.

    Args:
        family: a key of `FAMILIES`.
        path: the backbone folder.
        trunk: its sub-folder with the trunk's weights, or any other path to them.
        dtype: of the trunk.

    Raises:
        ValueError: for an unknown family or an incomplete folder.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown model.family {family!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family](path, trunk, dtype)
