"""Recipes of the shipped image tokenizer and CLIP scorer; here are their sizes, which need no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerRecipe:
    """Sizes of the image tokenizer; the group `tokenizer` of the configuration.

    Attributes:
        num_codes: size of the codebook.
        code_dim: number of channels of a code vector.
        channels: widths of the autoencoder's stages; each but the last halves the side.
        patch: side of the space-to-depth patches in front of the first layer, in pixels.
        warmup_steps: number of steps without quantisation before k-means starts the codebook.
        revive_every: number of steps after which unused codes move.
        isolate_patches: whether a code depends on its own pixels alone.
        start: folder of a trained tokenizer whose codes are kept: only its decoder is trained, and the sizes
            above are those of the folder. None trains a new tokenizer.
    """

    num_codes: int = 512
    code_dim: int = 8
    channels: tuple[int, ...] = (32, 64)
    patch: int = 2
    warmup_steps: int = 200
    revive_every: int = 200
    isolate_patches: bool = True
    start: str | None = None

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        least = {"num_codes": 1, "code_dim": 1, "patch": 1, "revive_every": 1, "warmup_steps": 0}
        found = [
            f"{name}={getattr(self, name)}: must be at least {fewest}"
            for name, fewest in least.items()
            if getattr(self, name) < fewest
        ]
        if not self.channels or min(self.channels) < 1:
            found.append(f"channels={list(self.channels)}: give at least one width, each at least 1")
        return found


@dataclass(frozen=True)
class ClipRecipe:
    """Sizes of the small CLIP and its regularisation; the group `clip` of the configuration.

    Attributes:
        text_dir: folder of the text tokenizer (PreTrainedTokenizerFast with end, padding, unknown token).
        name: name of the scorer in metrics.
        patch_size: side of a patch in pixels.
        vision_width, vision_layers: size of the image transformer.
        text_width, text_layers: size of the text transformer.
        head_width: width of an attention head, in both.
        embed_dim: size of the common embedding.
        context_length: number of text tokens, the end token included.
        patch_dropout: share of patches a training image loses; it regularises and saves their time.
        text_dropout: share of tokens a training caption loses to the unknown token, so that no single word
            can be learnt by heart.
        warmup_share: share of all steps in which the learning rate rises before its cosine fall.
    """

    text_dir: str = "weights/tiny/text"
    name: str = "TinyEmojiCLIP"
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 2
    head_width: int = 32
    embed_dim: int = 128
    context_length: int = 24
    patch_dropout: float = 0.5
    text_dropout: float = 0.2
    warmup_share: float = 0.05

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        sizes = [name for name, value in vars(self).items() if isinstance(value, int)]
        found = [
            f"{name}={getattr(self, name)}: must be at least 1" for name in sizes if getattr(self, name) < 1
        ]
        found += [
            f"{name}={getattr(self, name)}: must be a multiple of head_width={self.head_width}"
            for name in ("vision_width", "text_width")
            if self.head_width > 0 and getattr(self, name) % self.head_width
        ]
        found += [
            f"{name}={getattr(self, name)}: is a share; it must lie in [0, 1)"
            for name in ("patch_dropout", "text_dropout", "warmup_share")
            if not 0 <= getattr(self, name) < 1
        ]
        return found
