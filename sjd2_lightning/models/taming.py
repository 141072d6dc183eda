"""Meta's image tokenizer (`vqgan.ckpt`, of the code taming-transformers) as diffusers' VQModel."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffusers import VQModel
from torch import Tensor

_IN_RESNET = {"nin_shortcut": "conv_shortcut"}
_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_SAME = re.compile(
    r"(quantize\.embedding|(post_)?quant_conv|(encoder|decoder)\.conv_(in|out))\.(weight|bias)"
)
_NORM_OUT = re.compile(r"(encoder|decoder)\.norm_out\.(.+)")
_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.block\.(\d+)\.(\w+)\.(weight|bias)")
_SCALE = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(down|up)sample\.conv\.(weight|bias)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.block_([12])\.(\w+)\.(weight|bias)")
_ATTENTION_OF_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(\w+)\.(weight|bias)")
_ATTENTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(\w+)\.(weight|bias)")


def diffusers_name(name: str, num_blocks: int) -> str | None:
    """The name in `diffusers.VQModel` of a weight of taming's VQGAN; None if there is none.

    Args:
        name: in the original checkpoint.
        num_blocks: resolutions of the network.
    """
    if _SAME.fullmatch(name):
        return name
    if found := _NORM_OUT.fullmatch(name):
        return f"{found[1]}.conv_norm_out.{found[2]}"
    if found := _BLOCK.fullmatch(name):
        layer = _IN_RESNET.get(found[4], found[4])
        return f"{_block(found[1], int(found[2]), num_blocks)}.resnets.{found[3]}.{layer}.{found[5]}"
    if found := _SCALE.fullmatch(name):
        return f"{_block(found[1], int(found[2]), num_blocks)}.{found[3]}samplers.0.conv.{found[4]}"
    if found := _MIDDLE.fullmatch(name):
        layer = _IN_RESNET.get(found[3], found[3])
        return f"{found[1]}.mid_block.resnets.{int(found[2]) - 1}.{layer}.{found[4]}"
    if (found := _ATTENTION.fullmatch(name)) and found[2] in _IN_ATTENTION:
        return f"{found[1]}.mid_block.attentions.0.{_IN_ATTENTION[found[2]]}.{found[3]}"
    if (found := _ATTENTION_OF_LEVEL.fullmatch(name)) and found[4] in _IN_ATTENTION:
        block = _block(found[1], int(found[2]), num_blocks)
        return f"{block}.attentions.{found[3]}.{_IN_ATTENTION[found[4]]}.{found[5]}"
    return None


def _block(half: str, place: int, num_blocks: int) -> str:
    if half == "encoder.down":
        return f"encoder.down_blocks.{place}"
    return f"decoder.up_blocks.{num_blocks - 1 - place}"


def generator_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the discriminator and the perceptual network of the checkpoint's training."""
    return {name: value for name, value in state.items() if not name.startswith("loss.")}


def vq_from_taming(state: Mapping[str, Tensor]) -> VQModel:
    """The VQModel of a checkpoint; its sizes are read off the weights.

    Raises:
        ValueError: naming weights that are unknown or missing.
    """
    state = generator_weights(state)
    blocks = {int(found[2]) for name in state if (found := _BLOCK.fullmatch(name))}
    resnets = {int(found[3]) for name in state if (found := _BLOCK.fullmatch(name))}
    sizes = ("encoder.conv_in.weight", "quantize.embedding.weight", "quant_conv.weight")
    if lacking := [name for name in sizes if name not in state] or ([] if blocks else ["encoder.down.*"]):
        raise ValueError(f"this is no checkpoint of a VQGAN: {', '.join(lacking)} missing")
    names = {name: diffusers_name(name, len(blocks)) for name in state}
    if unknown := sorted(name for name, new in names.items() if new is None):
        raise ValueError(f"unknown weights in the VQGAN checkpoint: {', '.join(unknown)}")
    channels = [len(state[f"encoder.down.{place}.block.0.conv1.weight"]) for place in sorted(blocks)]
    attending = {int(found[2]) for name in state if (found := _ATTENTION_OF_LEVEL.fullmatch(name))}
    kinds = ["Attn" if level in attending else "" for level in sorted(blocks)]
    num_codes, code_dim = state["quantize.embedding.weight"].shape
    vq = VQModel(
        in_channels=state["encoder.conv_in.weight"].shape[1],
        out_channels=state["encoder.conv_in.weight"].shape[1],
        down_block_types=tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(channels),
        layers_per_block=max(resnets),  # the decoder has one resnet more than the encoder
        latent_channels=state["quant_conv.weight"].shape[1],
        num_vq_embeddings=num_codes,
        vq_embed_dim=code_dim,
        norm_num_groups=32,
        mid_block_add_attention=any(_ATTENTION.fullmatch(name) for name in state),
    )
    wanted = vq.state_dict()
    if missing := sorted(set(wanted) - set(names.values())):
        raise ValueError(f"the VQGAN checkpoint lacks the weights of {', '.join(missing)}")
    if extra := sorted(name for name, new in names.items() if new not in wanted):
        raise ValueError(f"unknown weights in the VQGAN checkpoint: {', '.join(extra)}")
    vq.load_state_dict(
        {str(new): state[name].float().reshape(wanted[str(new)].shape) for name, new in names.items()}
    )
    return vq.eval()
