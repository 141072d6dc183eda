"""Speculative Jacobi-Denoising Decoding (SJD2): training and decoding of autoregressive text-to-image models.

The package imports nothing on its own: `sjd2_lightning.decoding` needs only torch, training needs Lightning,
and each part is imported from its module. `Pipeline` alone can be had from here; see `cli.pipeline`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        return import_module("sjd2_lightning.cli.pipeline").Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
