"""The typed groups of the recipes: sizes of the shipped image tokenizer and of the CLIP scorer.

Values live in `conf/experiment`; there are no defaults here. Source: ours.
"""

from __future__ import annotations

from sjd2_lightning.config_base import Count, Group, Natural, Share


class TokenizerRecipe(Group):
    """`recipes.tokenizer.TokenizerModule`."""

    num_codes: Count
    code_dim: Count
    channels: tuple[Count, ...]
    patch: Count
    warmup_steps: Natural
    revive_every: Count
    isolate_patches: bool


class ClipRecipe(Group):
    """`recipes.clip.ClipModule`."""

    text_dir: str
    name: str
    patch_size: Count
    vision_width: Count
    vision_layers: Count
    text_width: Count
    text_layers: Count
    head_width: Count
    embed_dim: Count
    context_length: Count
    patch_dropout: Share
    text_dropout: Share
    warmup_share: Share
