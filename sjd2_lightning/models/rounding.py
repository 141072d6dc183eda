"""Linear layers of 8 bits: one byte a weight, to decode by torchao, and under an adapter that is trained by
our own; products in fp8, to train all weights, by torchao.

torchao's layers were not taken for training: it would need an extra package, and what a layer keeps for its
backward pass would be its whole weight. Here the backward pass makes the weight again from its codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST = 127  # code of the largest weight of a row
_FP8_CARDS = (8, 9)  # compute capability


class Int8Linear(nn.Module):
    """A linear layer of rounded weights `codes * scale`, which are not trained.

    Args:
        layer: the layer whose weights are rounded; its bias is shared.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scale = rounded(layer.weight.detach())
        # parameters and no buffers: DDP sends buffers to all ranks in every step
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """(out, in) the weights that are multiplied with, in the type that they had before."""
        return _weight(self.codes, self.scale)

    def forward(self, hidden: Tensor) -> Tensor:
        found = _Product.apply(hidden, self.codes, self.scale)
        return found if self.bias is None else found + self.bias.to(found.dtype)


class _Product(torch.autograd.Function):
    """Hidden states times the transposed weights; what is kept for the backward pass are the codes."""

    @staticmethod
    def forward(hidden: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(hidden, _weight(codes, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        hidden, codes, scale = inputs
        ctx.save_for_backward(codes, scale)
        ctx.dtype = hidden.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # autocast is off here: the gradient has the type that the product was computed in
        return (gradient @ _weight(*ctx.saved_tensors).to(gradient.dtype)).to(ctx.dtype), None, None


def rounded(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out 1"]]:
    """Codes (out, in) from -127 to 127 and a scale (out, 1) for each row, in the type of the weights.

    No weight is off by more than half a scale, beside what the scale's own type rounds.
    """
    wide = weight.float()
    largest = wide.abs().amax(1, keepdim=True)
    scale = (largest / _LARGEST).clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)
    codes = (wide / scale.float()).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return codes, scale


def _weight(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(scale.dtype) * scale


def round_frozen(layers: nn.Module) -> None:
    """Puts an `Int8Linear` in the place of every linear layer that is not trained.

    Args:
        layers: layers of a trunk, whose adapter is there already.
    """
    for part in list(layers.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                setattr(part, name, Int8Linear(layer))


def round_to_decode(layers: nn.Module, kind: Literal["int8", "fp8"], device: torch.device) -> None:
    """Rounds the weights of all linear layers but an adapter's, one scale a row, by torchao.

    They cannot be trained then.

    Args:
        layers: layers of a trunk.
        kind: "int8", or "fp8" (e4m3).
        device: where they will decode.

    Raises:
        ValueError: torchao is not installed, or fp8 on a device without it.
    """
    if kind == "fp8" and not has_fp8(device):
        raise ValueError(
            f"model.quantize=fp8: the device {device} has no fp8 (NVIDIA cards from Ada and Hopper on "
            "have); use model.quantize=int8"
        )
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"model.quantize={kind}: torchao is not installed; `pip install 'sjd2-lightning[quantize]'`, "
            "or set model.quantize=null"
        ) from error
    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]
    # an adapter stays whole; torchao would change the compiler's settings for the whole process
    quantize_(
        layers,
        config(set_inductor_config=False),
        lambda part, name: isinstance(part, nn.Linear) and ".lora_" not in name,
    )


def train_in_fp8(layers: nn.Module, emulate: bool = False) -> None:
    """Multiplies in fp8 (e4m3, gradients e5m2) from now on, one scale a tensor, by torchao.

    Weights stay what they were, and are trained. Layers whose sizes are no multiples of 16 are left out.

    Args:
        layers: layers of a trunk.
        emulate: whether numbers are rounded to fp8 and multiplied in the type that they had, for tests.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and not (layer.in_features % 16 or layer.out_features % 16)

    # products for gradients of weights run over tokens, whose number is any
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(layers, config=config, module_filter_fn=fits)


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies numbers of 8 bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CARDS
