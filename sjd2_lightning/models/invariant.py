"""Arithmetic whose results do not depend on what else a pass computes: batch-invariant layers.

A token's numbers are the same bits alone, anywhere in a window, in any batch, and with any number of masked
key columns behind it: so replay equals one-token autoregression in bfloat16 too. On CUDA the kernels of
`invariant_kernels` compute; elsewhere torch does, on pieces of one fixed size.

Source: the idea is of "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab, 2025). Its
library batch_invariant_ops, and vLLM's mode of the same name, replace operators of the whole process, take
tiles of 128 rows without splits of the sum, which leaves most of a GPU idle at two rows, and have no
attention whose queries see timestep tokens and branches: hence own kernels.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm, ChameleonRMSNorm
from transformers.models.emu3.modeling_emu3 import Emu3RMSNorm
from transformers.models.glm_image.modeling_glm_image import GlmImageRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from sjd2_lightning.masks import Visible

ATTENTION = "sjd2_invariant"  # the name that transformers knows `attention` by
LARGEST_HEAD = 128
# Rows of one product on a CPU. Torch takes another kernel for 1 to 3 rows than for 64 in float32; 8 rows give
# each row the same bits in every place, and are the cheapest that do so in float32 (57 us, one row 27 us).
TILE = 8
CHUNK = 256  # key columns that are summed up apart


def problems(head_size: int, device: torch.device) -> list[str]:
    """Why `decoding.invariant=true` cannot run on a device; empty where it can.

    Args:
        head_size: size of one attention head.
        device: where the model lies.
    """
    if device.type != "cuda":
        return []
    found = []
    if head_size > LARGEST_HEAD:
        found.append(
            f"decoding.invariant=true: heads of size {head_size} are larger than {LARGEST_HEAD}, the largest "
            "that the kernels of attention take; set decoding.invariant=false, or run on a CPU"
        )
    if importlib.util.find_spec("triton") is None:
        found.append(
            "decoding.invariant=true: the package triton is not installed; "
            "`pip install 'sjd2-lightning[triton]'`, or set decoding.invariant=false"
        )
    return found


def _in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """A function of rows (M, ...) on pieces of `size` rows, the last one filled up with zeros."""
    padded = torch.cat([x, x.new_zeros(-len(x) % size, *x.shape[1:])])
    return torch.cat([function(piece) for piece in padded.split(size)])[: len(x)]


def linear(
    x: Float[Tensor, "*rows K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None
) -> Float[Tensor, "*rows N"]:
    """(..., N) `F.linear` of x (..., K); sums in float32, result in the type of x."""
    flat = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        from sjd2_lightning.models import invariant_kernels

        out = invariant_kernels.linear(flat, weight, bias)
    else:
        out = _in_pieces(lambda piece: F.linear(piece, weight, bias), flat, TILE)
    return out.view(*x.shape[:-1], -1)


class _ByRow(TorchFunctionMode):
    """Inside, `F.linear` is `linear`."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (linear if function is F.linear else function)(*args, **(kwargs or {}))


def rowwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a head, made of linear maps and operations on single numbers, gives of hidden states (..., K)."""
    if x.is_cuda:
        with _ByRow():
            return function(x)
    return _in_pieces(function, x.reshape(-1, x.shape[-1]), TILE).view(*x.shape[:-1], -1)


def rms_norm(
    x: Float[Tensor, "*rows K"], weight: Float[Tensor, " K"], eps: float
) -> Float[Tensor, "*rows K"]:
    """(..., K) rows over their root mean square, rounded to the type of x, times the weight (as in Llama)."""
    if x.is_cuda:
        from sjd2_lightning.models import invariant_kernels

        return invariant_kernels.norm(x.reshape(-1, x.shape[-1]), weight, None, eps, False).view_as(x)
    # torch reduces each row by itself on a CPU: the same bits for 1 to 300 rows of 16 to 4096 numbers
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def layer_norm(
    x: Float[Tensor, "*rows K"],
    weight: Float[Tensor, " K"] | None,
    bias: Float[Tensor, " K"] | None,
    eps: float,
) -> Float[Tensor, "*rows K"]:
    """(..., K) `F.layer_norm` over the last dimension; torch's own is by row on a CPU."""
    if x.is_cuda:
        from sjd2_lightning.models import invariant_kernels

        return invariant_kernels.norm(x.reshape(-1, x.shape[-1]), weight, bias, eps, True).view_as(x)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def attention(
    query: Float[Tensor, "B H L D"],
    keys: Float[Tensor, "B G S D"],
    values: Float[Tensor, "B G S D"],
    visible: Visible,
    scale: float,
) -> Float[Tensor, "B H L D"]:
    """Softmax attention; keys are summed up in chunks, and the chunks in one order.

    Chunks are counted from each row's first column, so a longer neighbour, which moves a row to the right,
    changes nothing. A column that nobody sees adds exact zeros; what lies in it must be finite.

    Args:
        query: (B, H, L, D) queries; H is a multiple of G.
        keys, values: (B, G, S, D), the last dimension contiguous; each head serves H / G heads of queries.
        visible: what each query sees, at least one column.
        scale: factor of the scores.
    """
    if query.is_cuda:
        from sjd2_lightning.models import invariant_kernels

        return invariant_kernels.attention(query, keys, values, visible, scale)
    batch, heads, length, size = query.shape
    key_heads, num_columns = keys.shape[1:3]
    group = heads // key_heads
    num_chunks = -(-num_columns // CHUNK) + 1
    steps = torch.arange(num_chunks * CHUNK, device=query.device)
    columns = (visible.first % CHUNK - CHUNK)[:, None] + steps  # (B, chunks * CHUNK)
    seen = visible.sees(columns) & ((columns >= 0) & (columns < num_columns))[:, None]
    columns = columns.clamp(0, num_columns - 1)
    out = torch.empty_like(query)
    for row in range(batch):
        marks = seen[row].repeat_interleave(group, dim=0)  # (L * group, chunks * CHUNK)
        for head in range(key_heads):
            members = slice(head * group, (head + 1) * group)
            asked = query[row, members].transpose(0, 1).reshape(length * group, size)
            mixed = _attend(
                asked, keys[row, head, columns[row]], values[row, head, columns[row]], marks, scale
            )
            out[row, members] = mixed.view(length, group, size).transpose(0, 1)
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """(M, D) attention of queries (M, D) to keys and values (chunks * CHUNK, D) in float32.

    Args:
        seen: (M, chunks * CHUNK) bool, which keys each query sees.
    """
    keys, values = keys.float(), values.float()

    def one_tile(packed: Tensor) -> Tensor:
        asked, mark = packed.split([query.shape[1], seen.shape[1]], dim=1)
        best = asked.new_full((TILE, 1), -torch.inf)
        total, mixed = asked.new_zeros(TILE, 1), torch.zeros_like(asked)
        for key, value, there in zip(
            keys.split(CHUNK), values.split(CHUNK), mark.split(CHUNK, dim=1), strict=True
        ):
            scores = (F.linear(asked, key) * scale).masked_fill(there == 0, -torch.inf)
            higher = best.maximum(scores.amax(1, keepdim=True))
            base = higher.masked_fill(higher == -torch.inf, 0)
            power, fade = (scores - base).exp(), (best - base).exp()
            total = total * fade + power.sum(1, keepdim=True)
            mixed = mixed * fade + F.linear(power, value.T)
            best = higher
        return mixed / total

    packed = torch.cat([query.float(), seen.float()], dim=1)
    return _in_pieces(one_tile, packed, TILE).to(query.dtype)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """`attention` as transformers calls it: output (B, L, H, D); the mask is a `Visible`.

    Raises:
        ValueError: for a mask of another type, or with dropout.
    """
    if not isinstance(attention_mask, Visible):
        raise ValueError(
            f"decoding.invariant=true: attention_mask is a {type(attention_mask).__name__}; invariant layers "
            "take `masks.Visible`"
        )
    if dropout:
        raise ValueError("decoding.invariant=true: dropout is on; call `eval()` on the model first")
    out = attention(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _transformers_attention)


class _Invariant(nn.Module):
    """Stands for another module: the same parameters under the same names, invariant arithmetic.

    Args:
        module: the module it stands for.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        if getattr(module, "bias", None) is None:
            self.bias = None
        self.eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
        self.train(module.training)


class _Linear(_Invariant):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _RMSNorm(_Invariant):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class _LayerNorm(_Invariant):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class _HeadNorm(_Invariant):
    """Chameleon's norm of queries and keys: weight and bias (heads, D), rounded after each operation."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, None, None, 1e-5) * self.weight + cast(Tensor, self.bias)


class _Elementwise(nn.Module):
    """An activation, row by row on a CPU: torch has other code for a tensor's end than for its middle."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return self.function(x)
        return _in_pieces(self.function, x.reshape(-1, x.shape[-1]), 1).view_as(x)


_STANDS_FOR: dict[type[nn.Module], type[_Invariant]] = {
    nn.Linear: _Linear,
    ChameleonRMSNorm: _RMSNorm,
    Emu3RMSNorm: _RMSNorm,
    GlmImageRMSNorm: _RMSNorm,
    LlamaRMSNorm: _RMSNorm,
    Qwen2RMSNorm: _RMSNorm,
    nn.LayerNorm: _LayerNorm,
    ChameleonLayerNorm: _HeadNorm,
}


def invariant_copy(module: nn.Module) -> nn.Module:
    """A copy of a decoder layer of transformers that computes invariantly, or of a single norm or linear map.

    The structure is copied, parameters are shared: names of the state are those of the original, so
    `torch.func.functional_call` takes any layer's parameters. Its `attention_mask` is a `Visible`.

    Args:
        module: a layer, or part of one, of Chameleon, Emu3, GLM-Image, Llama or Qwen2, adapters included.

    Raises:
        ValueError: for a part with parameters that is not known to be invariant.
    """
    shared = {id(parameter): parameter for parameter in module.parameters()}
    copied = copy.deepcopy(module, cast(dict[int, Any], shared))
    if type(copied) in _STANDS_FOR:
        return _STANDS_FOR[type(copied)](copied)
    for name, part in list(copied.named_modules()):
        if hasattr(part, "config"):
            part.config._attn_implementation = ATTENTION
        parent, _, own = name.rpartition(".")
        if stand_in := _STANDS_FOR.get(type(part)):
            stands = stand_in(part)
            stands._forward_hooks.update(part._forward_hooks)  # those of an adapter's gate
            setattr(copied.get_submodule(parent), own, stands)
        elif next(part.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"decoding.invariant=true: no invariant arithmetic for {name or 'the layer'}, a "
                f"{type(part).__name__}; set decoding.invariant=false"
            )
        elif own in ("act_fn", "activation_fn"):
            setattr(copied.get_submodule(parent), own, _Elementwise(part))
    return copied
