"""Releases of DINOv2, CLIP and PickScore made small, with random weights, as folders of transformers."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

SIDE = 56  # of the small CLIP's images


def small_dinov2(folder: Path) -> Path:
    """A DINOv2 with the release's layout, small and with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    config = Dinov2Config(**sizes, image_size=518, patch_size=14, layerscale_value=1.0)
    network = Dinov2Model(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    network.save_pretrained(folder)
    return folder


def small_clip(folder: Path) -> Path:
    """A whole CLIP, text tower included, as the release is."""
    torch.manual_seed(1)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**common, "vocab_size": 99, "max_position_embeddings": 16, "projection_dim": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # of the tokenizer below
    vision = {**common, "image_size": SIDE, "patch_size": 14, "projection_dim": 12}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for name, weight in network.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(weight, std=0.2)
    network.save_pretrained(folder)
    return folder


def pictures(num: int, side: int, seed: int = 0) -> Tensor:
    """Smooth random pictures (num, side, side, 3)."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 4, 4, generator=rng)
    pixels = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return pixels.mul(255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def small_pickscore(folder: Path) -> Path:
    """A release of PickScore with its processor and tokenizer, small and with random weights."""
    small_clip(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={name: place for place, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    return folder
