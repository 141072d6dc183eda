"""Brings a released LlamaGen, its image tokenizer and T5 into one folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from sjd2_lightning.models.llamagen import ENCODER, NUM_CODES, PREFIX, LlamaGenTokens
from sjd2_lightning.models.released_files import (
    TEXT_FILES,
    Writer,
    check_names,
    read_pickle,
    read_shard,
    shards_of,
    write_tokenizer,
)
from sjd2_lightning.models.small import byte_tokenizer
from sjd2_lightning.models.taming import vq_from_taming
from sjd2_lightning.models.weights import BACKBONE_FILE, TEXT, TRUNK, finite, read_json
from sjd2_lightning.run.files import sha256_of_file

_HEADS = {
    768: 12,
    1024: 16,
    1280: 20,
    1536: 24,
    2048: 32,
    2560: 40,
    3200: 32,
    4096: 32,
}  # of the releases, by width
_COMPUTED = re.compile(r"freqs_cis|causal_mask|.*\.kv_cache\..*")
_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PREFIXES = {
    "class": {"cls_embedding.embedding_table.weight": "classes.weight"},
    "text": {
        "cls_embedding.cap_proj.fc1.weight": "fc1.weight",
        "cls_embedding.cap_proj.fc2.weight": "fc2.weight",
        "cls_embedding.uncond_embedding": "empty",
    },
}


def trunk_state(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The trunk by transformers' names, rows of queries and keys half a head apart.

    Args:
        state: the release's trunk, by its names.
        num_heads: number of attention heads.

    Raises:
        ValueError: naming weights that are unknown or missing.
    """
    num_layers = 1 + max(
        (int(name.split(".")[1]) for name in state if name.startswith("layers.")), default=-1
    )
    wanted = {f"layers.{n}.{part}.weight" for n in range(num_layers) for part in ("attention.wqkv", *_LAYER)}
    check_names(set(state), wanted | set(_ENDS), "the .pt")
    found = {new: state[name] for name, new in _ENDS.items()}
    for number in range(num_layers):
        for part, new in _LAYER.items():
            found[f"model.layers.{number}.{new}.weight"] = state[f"layers.{number}.{part}.weight"]
        for letter, weight in zip(
            "qkv", state[f"layers.{number}.attention.wqkv.weight"].chunk(3), strict=True
        ):
            if letter != "v":
                pairs = weight.view(num_heads, -1, 2, weight.shape[-1])
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            found[f"model.layers.{number}.self_attn.{letter}_proj.weight"] = weight
    return found


def taming_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LlamaGen's image tokenizer by taming's names; entries of the codebook of length 1, as it reads them."""
    num_levels = len(
        {found[1] for name in state if (found := re.match(r"decoder\.conv_blocks\.(\d+)\.", name))}
    )
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    renamed = {}
    for name, value in state.items():
        if name == "quantize.codebook_used":
            continue
        new = re.sub(r"\.mid\.([012])\.", lambda m: f".mid.{middle[m[1]]}.", name)
        new = re.sub(r"encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", new)
        new = re.sub(
            r"decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{num_levels - 1 - int(m[1])}.", new
        )
        new = re.sub(r"\.(down|up)\.(\d+)\.res\.", r".\1.\2.block.", new)
        renamed[new] = F.normalize(value.float(), dim=-1) if new == "quantize.embedding.weight" else value
    return renamed


def convert_llamagen(
    gpt: Path, vq: Path, out: Path, side: int, t5: Path | None = None, num_heads: int | None = None
) -> list[str]:
    """Writes `backbone.json`, `trunk/`, `prefix.safetensors`, `text/`, `tokenizer/`, `text_encoder/`.

    Args:
        gpt: the release's trunk, `t2i_*.pt` or `c2i_*.pt`.
        vq: its image tokenizer, `vq_ds16_*.pt`.
        out: the new folder.
        side: codes on each side of the images that the trunk draws.
        t5: folder of flan-t5-xl in Hugging Face layout, for a model of texts.
        num_heads: attention heads; None = those of the release of this width.

    Returns:
        Names of the files that were made; empty if everything was there.

    Raises:
        ValueError: before anything is written, if a file is missing or weights are unknown or missing.
    """
    for needed in (gpt, vq):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing")
    state = {name: value for name, value in read_pickle(gpt).items() if not _COMPUTED.fullmatch(name)}
    condition = "class" if "cls_embedding.embedding_table.weight" in state else "text"
    prefix = {name: state.pop(name) for name in list(state) if name.startswith("cls_embedding.")}
    check_names(set(prefix), set(_PREFIXES[condition]), str(gpt))
    if condition == "text" and (t5 is None or not (t5 / "tokenizer.json").is_file()):
        raise ValueError(
            f"{gpt.name} is drawn from texts: --t5 needs a folder of flan-t5-xl with tokenizer.json"
        )
    width = int(state["tok_embeddings.weight"].shape[1])
    heads = num_heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"{gpt} is {width} wide, as no release: its number of heads is not known")
    trunk = {name: finite(name, value, gpt).contiguous() for name, value in trunk_state(state, heads).items()}
    tokenizer = vq_from_taming(taming_names(read_pickle(vq)))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=len(trunk["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=sum(name.endswith("input_layernorm.weight") for name in trunk),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=len(trunk["lm_head.weight"]),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    if (config.vocab_size, tokenizer.config.num_vq_embeddings) != (NUM_CODES, NUM_CODES):
        raise ValueError(
            f"{gpt} has {config.vocab_size} codes, {vq} {tokenizer.config.num_vq_embeddings}, not 16,384"
        )
    writer, source = Writer(out), sha256_of_file(gpt)
    named = {
        _PREFIXES[condition][name]: finite(name, value, gpt).contiguous() for name, value in prefix.items()
    }
    writer.write(f"{TRUNK}/model.safetensors", source, lambda path: save_file(trunk, path, {"format": "pt"}))
    writer.write(PREFIX, source, lambda path: save_file(named, path))
    _write_json(writer, f"{TRUNK}/config.json", config.to_dict())
    if t5 is not None and condition == "text":
        _write_t5(writer, t5)
    else:  # no text is read: bytes stand in for words
        writer.write(f"{TEXT}/tokenizer.json", "bytes", _save_bytes)
    write_tokenizer(writer, tokenizer, vq)
    fields = {"family": "llamagen", **asdict(LlamaGenTokens(condition=condition, side=side))}
    _write_json(writer, BACKBONE_FILE, fields)
    return writer.made


def _save_bytes(path: Path) -> None:
    byte_tokenizer(0, {}).backend_tokenizer.save(str(path))


def _write_json(writer: Writer, name: str, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    writer.write(name, hashlib.sha256(text.encode()).hexdigest(), lambda path: path.write_text(text))


def _write_t5(writer: Writer, t5: Path) -> None:
    """Tokenizer and encoder of T5, without its decoder."""
    for file in (t5 / name for name in TEXT_FILES):
        if file.is_file():
            writer.write(f"{TEXT}/{file.name}", sha256_of_file(file), partial(shutil.copyfile, file))
    _write_json(writer, f"{ENCODER}/config.json", read_json(t5 / "config.json"))
    shards = shards_of(t5)

    def save(path: Path) -> None:
        kept = {
            name: value.contiguous()
            for shard in shards
            for name, value in read_shard(shard)
            if name == "shared.weight"
            or (name.startswith("encoder.") and name != "encoder.embed_tokens.weight")
        }
        save_file(kept, path, {"format": "pt"})

    writer.write(f"{ENCODER}/model.safetensors", " ".join(map(sha256_of_file, shards)), save)
