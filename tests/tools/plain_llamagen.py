"""LlamaGen written out as published: numbers side by side turn, by rows and columns of a grid; no cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.models.llamagen import LlamaGenBackbone


def side_by_side(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a projection of queries or keys in the release's order."""
    heads = weight.view(num_heads, 2, -1, weight.shape[-1])
    return heads.transpose(1, 2).reshape(weight.shape)


def published_state(backbone: LlamaGenBackbone) -> dict[str, Tensor]:
    """The weights by the names and in the order of the release's `.pt`."""
    model, heads = backbone.model, backbone.model.config.num_attention_heads
    state = {
        "tok_embeddings.weight": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    if backbone.tokens.condition == "class":
        state["cls_embedding.embedding_table.weight"] = backbone.prefix.classes.weight
    else:
        state["cls_embedding.cap_proj.fc1.weight"] = backbone.prefix.fc1.weight
        state["cls_embedding.cap_proj.fc2.weight"] = backbone.prefix.fc2.weight
        state["cls_embedding.uncond_embedding"] = backbone.prefix.empty
    for number, layer in enumerate(model.model.layers):
        name, own = f"layers.{number}", layer.self_attn
        turned = [side_by_side(part.weight, heads) for part in (own.q_proj, own.k_proj)]
        state[f"{name}.attention.wqkv.weight"] = torch.cat([*turned, own.v_proj.weight])
        state[f"{name}.attention.wo.weight"] = own.o_proj.weight
        state[f"{name}.feed_forward.w1.weight"] = layer.mlp.gate_proj.weight
        state[f"{name}.feed_forward.w2.weight"] = layer.mlp.down_proj.weight
        state[f"{name}.feed_forward.w3.weight"] = layer.mlp.up_proj.weight
        state[f"{name}.attention_norm.weight"] = layer.input_layernorm.weight
        state[f"{name}.ffn_norm.weight"] = layer.post_attention_layernorm.weight
    return {name: value.detach().clone() for name, value in state.items()}


def plain_llamagen(backbone: LlamaGenBackbone, prompt_ids: list[int], codes: list[int]) -> Tensor:
    """(n, K) logits behind a prompt and codes, by the published definition on the published weights."""
    state, tokens = published_state(backbone), backbone.tokens
    heads, num_layers = backbone.model.config.num_attention_heads, backbone.model.config.num_hidden_layers
    if tokens.condition == "class":
        x = state["cls_embedding.embedding_table.weight"][prompt_ids]
    else:
        if prompt_ids[0] >= backbone.num_texts:  # the release's last features of no caption
            features = state["cls_embedding.uncond_embedding"][-len(prompt_ids) :]
        else:  # padded on the right to 120, as the release calls T5
            padded = torch.zeros(1, tokens.most_features, dtype=torch.long)
            padded[0, : len(prompt_ids)] = torch.tensor(prompt_ids)
            mask = (torch.arange(tokens.most_features) < len(prompt_ids))[None]
            found = backbone.text_encoder(input_ids=padded, attention_mask=mask.long()).last_hidden_state
            features = found[0, : len(prompt_ids)]
        hidden = F.gelu(features @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        x = hidden @ state["cls_embedding.cap_proj.fc2.weight"].T
    x = torch.cat([x, state["tok_embeddings.weight"][torch.tensor(codes, dtype=torch.long)]])
    length, width = x.shape
    size = width // heads
    turns = torch.zeros(length, size // 2, 2)  # cosine and sine of each pair; zero in front of the image
    for place in range(len(codes)):
        row, column = place // tokens.side, place % tokens.side
        for pair in range(size // 2):
            axis, number = (row, pair) if pair < size // 4 else (column, pair - size // 4)
            angle = axis * 10000.0 ** (-2 * number / (size // 2))
            turns[len(prompt_ids) + place, pair] = torch.tensor([math.cos(angle), math.sin(angle)])

    def norm(name: str, value: Tensor) -> Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5) * state[name]

    def turned(value: Tensor) -> Tensor:  # (L, H, D)
        a, b = value.view(length, heads, size // 2, 2).unbind(-1)
        c, s = turns[:, None].unbind(-1)
        return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(2)

    causal = torch.ones(length, length).tril().bool()
    for number in range(num_layers):
        name = f"layers.{number}"
        mixed = norm(f"{name}.attention_norm.weight", x) @ state[f"{name}.attention.wqkv.weight"].T
        q, k, v = (part.view(length, heads, size) for part in mixed.split(width, dim=-1))
        scores = torch.einsum("lhd,shd->hls", turned(q), turned(k)) / math.sqrt(size)
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        seen = torch.einsum("hls,shd->lhd", weights, v).flatten(1)
        x = x + seen @ state[f"{name}.attention.wo.weight"].T
        inner = norm(f"{name}.ffn_norm.weight", x)
        gate = F.silu(inner @ state[f"{name}.feed_forward.w1.weight"].T)
        up = inner @ state[f"{name}.feed_forward.w3.weight"].T
        x = x + (gate * up) @ state[f"{name}.feed_forward.w2.weight"].T
    return norm("norm.weight", x) @ state["output.weight"].T
