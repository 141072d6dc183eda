"""TarFlow: an autoregressive normalizing flow over patches of pixels (Zhai et al. 2024, arXiv 2412.06329)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.fixed_point import Schedule, Solution, solve
from sjd2_lightning.models.kv_cache import KVCache
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.values import Count, Within, wrong_values

SETTINGS, WEIGHTS = "flow.json", "flow.safetensors"


@dataclass(frozen=True)
class FlowSizes:
    """Sizes of a flow, and the noise that its pixels have.

    Attributes:
        image_size: side of the pictures in pixels.
        patch_size: side of a patch in pixels; T = (image_size / patch_size)^2 patches of C = 3 patch_size^2.
        width: width of the transformers.
        num_blocks: K, number of blocks; every second one reads the patches in reversed order.
        num_layers: transformer layers of a block.
        head_width: width of an attention head.
        text_width: numbers of a prompt's vector.
        noise: what training adds to pixels in [-1, 1]: `gaussian`, for samples, or `uniform` inside a grey
            level, for likelihoods.
        sigma: standard deviation of gaussian noise.
    """

    image_size: Count = 32
    patch_size: Count = 2
    width: Count = 64
    num_blocks: Count = 4
    num_layers: Count = 2
    head_width: Count = 32
    text_width: Count = 128
    noise: Literal["gaussian", "uniform"] = "gaussian"
    sigma: Annotated[float, Within(0, 1)] = 0.1

    @property
    def num_patches(self) -> int:
        """T."""
        return (self.image_size // self.patch_size) ** 2

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        for name, part in (("image_size", "patch_size"), ("width", "head_width")):
            if getattr(self, part) > 0 and getattr(self, name) % getattr(self, part):
                found.append(
                    f"{name}={getattr(self, name)}: must be a multiple of {part}={getattr(self, part)}"
                )
        return found


class FlowLayer(nn.Module):
    """One pre-norm transformer layer with causal attention.

    Args:
        width: width of the layer.
        head_width: width of a head.
    """

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: KVCache | None, number: int) -> Tensor:
        """(B, L, width) of (B, L, width), whose keys and values a cache gets as those of layer `number`."""
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        if cache is not None:
            key, value = cache.layer(number).update(key, value)
        num, seen = query.shape[2], key.shape[2]
        mask = None
        if 1 < num < seen:
            mask = torch.ones(num, seen, dtype=torch.bool, device=x.device).tril(seen - num)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=num == seen and num > 1)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class FlowBlock(nn.Module):
    """One block: z_t = (x_t - u_t(x_<t)) exp(-s_t(x_<t)), with s and u of position 0 being 0.

    It starts as the identity. A reversed block reads the last patch first; its table of places belongs to
    patches, so it is read in reversed order too.

    Args:
        sizes: sizes of the flow.
        is_reversed: whether the last patch comes first.
    """

    def __init__(self, sizes: FlowSizes, is_reversed: bool) -> None:
        super().__init__()
        numbers, width = 3 * sizes.patch_size**2, sizes.width
        self.is_reversed = is_reversed
        self.patch, self.text = nn.Linear(numbers, width), nn.Linear(sizes.text_width, width)
        self.places = nn.Parameter(0.01 * torch.randn(sizes.num_patches, width))
        self.layers = nn.ModuleList(FlowLayer(width, sizes.head_width) for _ in range(sizes.num_layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * numbers)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def ordered(self, patches: Tensor) -> Tensor:
        """(B, T, C) from raster order to the block's own, or back."""
        return patches.flip(1) if self.is_reversed else patches

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for all patches but the last, which nothing reads."""
        some: nn.Linear = self.text
        head_width = self.layers[0].head_width
        return KVCache(
            len(self.layers),
            batch,
            some.out_features // head_width,  # type: ignore[operator, arg-type]
            max(len(self.places) - 1, 1),
            head_width,  # type: ignore[arg-type]
            dtype=some.weight.dtype,
            device=some.weight.device,
        )

    def scale_and_shift(
        self, first: int, fed: Tensor, text: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """s and u, (B, L, C) each, of positions first + 1 .. first + L of the block's own order.

        Args:
            first: the first position that is fed; those to its left are in the cache.
            fed: (B, L, C) patches of positions first .. first + L - 1.
            text: (B, D) vectors of prompts.
            cache: keys and values, written at the positions that are fed; None: `first` is 0.
        """
        last = first + fed.shape[1]
        places = self.places.flip(0) if self.is_reversed else self.places
        x = self.patch(fed) + places[first:last] + self.text(text)[:, None]
        if cache is not None:
            cache.place(torch.arange(first, last, device=fed.device).expand(len(fed), -1), last)
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, number)
        scale, shift = self.out(self.norm(x)).chunk(2, dim=-1)
        return scale, shift

    def forward(self, patches: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, T, C) in raster order, and the log-determinant a number (B,), of patches (B, T, C)."""
        x = self.ordered(patches)
        scale, shift = self.scale_and_shift(0, x[:, :-1], text)
        z = torch.cat([x[:, :1], (x[:, 1:] - shift) * torch.exp(-scale)], dim=1)
        return self.ordered(z), -scale.sum((1, 2)) / x[0].numel()


class BlockInverse:
    """The inverse of a block as a causal map: x_0 = z_0, x_t = z_t exp(s_t(x_<t)) + u_t(x_<t).

    With guidance w, s_t and u_t are those of the prompt plus w t / (T - 1) times what the prompt changes.

    Args:
        block: the block.
        z: (B, T, C) its output, in its own order.
        text: (B, D) vectors of prompts.
        dropped: (D,) vector of a dropped prompt.
        guidance: w, at least 0; 0 reads the prompt alone.
    """

    def __init__(self, block: FlowBlock, z: Tensor, text: Tensor, dropped: Tensor, guidance: float) -> None:
        self.block, self.z, self.guidance = block, z, guidance
        self.text = torch.cat([text, dropped.expand_as(text)]) if guidance else text
        self.cache = block.new_cache(len(self.text))

    @property
    def length(self) -> int:
        return self.z.shape[1]

    def values(self, first: int, fed: Tensor) -> Tensor:
        """(B, L, C) new values of positions first + 1 .. first + L; see `fixed_point.CausalMap`."""
        rows = torch.cat([fed, fed]) if self.guidance else fed
        scale, shift = self.block.scale_and_shift(first, rows, self.text, self.cache)
        behind = slice(first + 1, first + 1 + fed.shape[1])
        if self.guidance:
            weight = (
                self.guidance * torch.arange(self.length, device=fed.device)[behind, None] / (self.length - 1)
            )
            (scale, bare_scale), (shift, bare_shift) = scale.chunk(2), shift.chunk(2)
            scale = scale + weight * (scale - bare_scale)
            shift = shift + weight * (shift - bare_shift)
        return self.z[:, behind] * torch.exp(scale) + shift


class TarFlow(nn.Module):
    """K blocks, whose composition turns pictures into standard normal numbers.

    Args:
        sizes: sizes of the flow.
    """

    dropped_text: Tensor

    def __init__(self, sizes: FlowSizes) -> None:
        super().__init__()
        if found := sizes.problems():
            raise ValueError("; ".join(found))
        self.sizes = sizes
        self.blocks = nn.ModuleList(FlowBlock(sizes, bool(number % 2)) for number in range(sizes.num_blocks))
        self.register_buffer("dropped_text", torch.zeros(sizes.text_width))

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, T, C) of pixels (B, 3, h, w)."""
        return F.pixel_unshuffle(pixels, self.sizes.patch_size).flatten(2).transpose(1, 2)

    def pixels(self, patches: Tensor) -> Tensor:
        """(B, 3, h, w) of patches (B, T, C)."""
        side = self.sizes.image_size // self.sizes.patch_size
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), self.sizes.patch_size)

    def noisy(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, h, w) in [0, 1], brought to [-1, 1] and noised as `sizes.noise` says."""
        if self.sizes.noise == "uniform":
            grey = (pixels * 255).round()
            uniform = torch.rand(pixels.shape, generator=generator, device=pixels.device)
            return 2 * (grey + uniform) / 256 - 1
        normal = torch.randn(pixels.shape, generator=generator, device=pixels.device)
        return 2 * pixels - 1 + self.sizes.sigma * normal

    def forward(self, pixels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, T, C) and the log-determinant a number (B,) of pixels (B, 3, h, w) in about [-1, 1]."""
        z, logdet = self.patches(pixels), pixels.new_zeros(len(pixels))
        for block in self.blocks:
            z, own = block(z, text)
            logdet = logdet + own
        return z, logdet

    @torch.no_grad()
    def invert(
        self, z: Tensor, text: Tensor, schedules: Sequence[Schedule], guidance: float = 0.0
    ) -> tuple[Tensor, list[Solution]]:
        """Pixels (B, 3, h, w) whose z is given, and how each block was inverted, the last block first.

        Args:
            z: (B, T, C) float32.
            text: (B, D) vectors of prompts.
            schedules: one a block, in the order of inversion.
            guidance: see `BlockInverse`.
        """
        found = []
        for block, schedule in zip(reversed(self.blocks), schedules, strict=True):
            assert isinstance(block, FlowBlock)
            own = block.ordered(z)
            solution = solve(BlockInverse(block, own, text, self.dropped_text, guidance), own, schedule)
            found.append(solution)
            z = block.ordered(solution.values)
        return self.pixels(z), found

    def denoised(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Pixels without their gaussian noise: x + sigma^2 times the gradient of log p(x) (Tweedie)."""
        with torch.enable_grad():
            x = pixels.detach().requires_grad_()
            z, logdet = self(x, text)
            log_p = (z[0].numel() * logdet).sum() - 0.5 * z.square().sum()
            (gradient,) = torch.autograd.grad(log_p, x)
        return pixels + self.sizes.sigma**2 * gradient

    def save(self, folder: str | Path) -> None:
        """Writes flow.json and flow.safetensors, each whole."""
        write_whole(Path(folder) / WEIGHTS, save({k: v.contiguous() for k, v in self.state_dict().items()}))
        write_whole(Path(folder) / SETTINGS, json.dumps(asdict(self.sizes), indent=2) + "\n")


def load_tarflow(folder: str | Path) -> TarFlow:
    """The flow that `save` wrote, in eval mode.

    Raises:
        ValueError: a file is missing or does not fit the other.
    """
    folder = Path(folder)
    try:
        flow = TarFlow(FlowSizes(**json.loads((folder / SETTINGS).read_text())))
        flow.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"no flow in {folder} ({str(error).splitlines()[0]}); train one with experiment=tarflow"
        ) from error
    return flow.eval()


def flow_loss(z: Tensor, logdet: Tensor) -> Tensor:
    """Negative log-likelihood a number without its constant: z (B, T, C), logdet (B,) a number; scalar."""
    return 0.5 * z.square().mean() - logdet.mean()


def bits_per_dim(loss: Tensor) -> Tensor:
    """Bits a number of a loss of `flow_loss`: a grey level is 1/128 wide in [-1, 1].

    With uniform noise it bounds the bits of the picture; with gaussian noise it is one of noisy data.
    """
    return (loss + 0.5 * math.log(2 * math.pi) + math.log(128)) / math.log(2)
