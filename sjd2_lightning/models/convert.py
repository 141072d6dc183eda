"""Brings a released Lumina-mGPT and Meta's image tokenizer into one folder;
or a released LlamaGen, its image tokenizer and T5.

One shard at a time lies in memory; by `manifest.json` what was cut off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from sjd2_lightning.models.chameleon import LUMINA_MGPT
from sjd2_lightning.models.released_files import (
    TEXT_FILES,
    Writer,
    check_names,
    names_of,
    read_pickle,
    read_shard,
    shards_of,
    write_tokenizer,
)
from sjd2_lightning.models.taming import generator_weights, vq_from_taming
from sjd2_lightning.models.weights import (
    BACKBONE_FILE,
    INDEX,
    TEXT,
    TRUNK,
    check_once,
    finite,
    read_json,
)
from sjd2_lightning.run.files import sha256_of_file
from sjd2_lightning.run.stages import speak, stage

VQ_PREFIX = "model.vqmodel."
_BUFFERS = (".rotary_emb.inv_freq",)  # computed, not loaded; older checkpoints hold them


def expanded(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A weight in the shape of transformers' class: norms of queries and keys have a row for every head.

    The release stores a row for each shard that it was trained on; every head of a shard has that row.

    Raises:
        ValueError: for any other difference of shapes.
    """
    is_norm = name.endswith(("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"))
    if value.shape == shape:
        return value
    if is_norm and value.ndim == 2 and value.shape[1] == shape[1] and shape[0] % value.shape[0] == 0:
        return value.repeat_interleave(shape[0] // value.shape[0], dim=0)
    raise ValueError(f"{name} has shape {tuple(value.shape)}; config.json asks for {tuple(shape)}")


def trunk_config(trunk: Path, text: Path) -> dict[str, Any]:
    """The trunk's config.json; names of the codes come from the text tokenizer where it lacks them.

    Raises:
        ValueError: if it is of another type of model, or nothing names the codes.
    """
    path = trunk / "config.json"
    if not path.is_file():
        raise ValueError(f"--trunk {trunk}: config.json is missing")
    config = read_json(path)
    if "chameleon" not in str(config.get("model_type", "")):
        raise ValueError(f"{path} is of a model of type {config.get('model_type')!r}, not of a Chameleon")
    if not config.get("vocabulary_map"):
        vocabulary = read_json(text / "tokenizer.json").get("model", {}).get("vocab", {})
        names = {name: token for name, token in vocabulary.items() if name.startswith("IMGIMG")}
        if not names:
            raise ValueError(
                f"neither {path} nor {text / 'tokenizer.json'} names the image codes (IMGIMG...Z)"
            )
        image = vocabulary.get("<image>", vocabulary.get("<reserved08707>"))
        config["vocabulary_map"] = {"<image>": image, **names}
    return config | {"model_type": "chameleon", "architectures": ["ChameleonForConditionalGeneration"]}


def convert(trunk: Path, vqgan: Path, out: Path, text: Path | None = None) -> list[str]:
    """Writes `backbone.json`, `trunk/`, `text/` and `tokenizer/`.

    Args:
        trunk: folder of the released trunk: config.json and its weight files.
        vqgan: Meta's vqgan.ckpt.
        out: the new folder.
        text: folder with tokenizer.json, if it does not lie beside the trunk.

    Returns:
        Names of the files that were made; empty if everything was there.

    Raises:
        ValueError: before anything is written, if a file is missing or weights are unknown or missing; of a
            weight that is not finite, before its shard is.
    """
    text = text or trunk
    for needed in (text / "tokenizer.json", vqgan):
        if not needed.is_file():
            raise ValueError(f"{needed} is missing")
    fields = trunk_config(trunk, text)
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in ChameleonForConditionalGeneration(ChameleonConfig(**fields))
            .state_dict()
            .items()
        }
    state = read_pickle(vqgan)
    for name, value in generator_weights(state).items():
        finite(name, value, vqgan)
    vq = vq_from_taming(state)
    encoder = {
        VQ_PREFIX + name: value.contiguous()
        for name, value in generator_weights(state).items()
        if not name.startswith("decoder.")
    }
    shards = shards_of(trunk)
    names = {shard: [name for name in names_of(shard) if not name.endswith(_BUFFERS)] for shard in shards}
    check_once(names)
    own = {name for found in names.values() for name in found if not name.startswith(VQ_PREFIX)}
    check_names(own, {name for name in shapes if not name.startswith(VQ_PREFIX)}, str(trunk))
    check_names(set(encoder), {name for name in shapes if name.startswith(VQ_PREFIX)}, str(vqgan))
    writer = Writer(out)
    _write(writer, fields, shapes, names, encoder, vq, vqgan, text)
    return writer.made


def _write(
    writer: Writer,
    fields: dict[str, Any],
    shapes: dict[str, torch.Size],
    names: dict[Path, list[str]],
    encoder: dict[str, Tensor],
    vq: Any,
    vqgan: Path,
    text: Path,
) -> None:
    write = writer.write

    def write_json(name: str, content: object) -> None:
        source = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write(name, hashlib.sha256(source.encode()).hexdigest(), lambda path: path.write_text(source))

    weight_map: dict[str, str] = {}
    for place, (shard, found) in enumerate([*names.items(), (vqgan, list(encoder))]):
        name = f"model-{place + 1:05d}-of-{len(names) + 1:05d}.safetensors"
        kept = [weight for weight in found if shard == vqgan or not weight.startswith(VQ_PREFIX)]
        weight_map |= dict.fromkeys(kept, name)

        def save(path: Path, shard: Path = shard, kept: list[str] = kept) -> None:
            weights = encoder.items() if shard == vqgan else read_shard(shard)
            tensors = {
                weight: expanded(weight, finite(weight, value, shard), shapes[weight]).contiguous()
                for weight, value in weights
                if weight in kept
            }
            save_file(tensors, path, {"format": "pt"})

        write(f"{TRUNK}/{name}", sha256_of_file(shard), save)
    write_json(f"{TRUNK}/{INDEX}", {"metadata": {}, "weight_map": weight_map})
    write_json(f"{TRUNK}/config.json", fields)
    for file in (text / name for name in TEXT_FILES):
        if file.is_file():
            write(f"{TEXT}/{file.name}", sha256_of_file(file), partial(shutil.copyfile, file))
    write_tokenizer(writer, vq, vqgan)
    write_json(BACKBONE_FILE, {"family": "chameleon", **asdict(LUMINA_MGPT)})


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `sjd2 convert`."""
    parser = argparse.ArgumentParser(
        prog="sjd2 convert",
        description=__doc__,
        epilog="examples:\n  sjd2 convert --trunk Lumina-mGPT-7B-768 --vqgan vqgan.ckpt --out weights/mine\n"
        "  sjd2 convert --gpt t2i_XL_stage2_512.pt --vq vq_ds16_t2i.pt --t5 flan-t5-xl \\\n"
        "      --out weights/llamagen",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument, type=Path)
    add("--trunk", metavar="FOLDER", help="folder of the released Lumina-mGPT")
    add("--vqgan", metavar="FILE", help="Meta's vqgan.ckpt, beside --trunk")
    add("--text", metavar="FOLDER", help="folder with tokenizer.json, if it is not in --trunk")
    add("--out", metavar="FOLDER", required=True, help="the new folder, for model.path")
    add("--gpt", metavar="FILE", help="LlamaGen's t2i_*.pt or c2i_*.pt")
    add("--vq", metavar="FILE", help="its vq_ds16_*.pt, beside --gpt")
    add("--t5", metavar="FOLDER", help="flan-t5-xl, for t2i_*.pt")
    parser.add_argument("--side", type=int, default=32, help="codes on a side of its images (512 pixels: 32)")
    asked = parser.parse_args(arguments)
    if not (asked.trunk and asked.vqgan) and not (asked.gpt and asked.vq):
        parser.error("give --trunk and --vqgan, or --gpt and --vq")
    speak()
    try:
        with stage(f"converting {asked.gpt or asked.trunk}"):
            if asked.gpt:
                from sjd2_lightning.models.convert_llamagen import convert_llamagen

                made = convert_llamagen(asked.gpt, asked.vq, asked.out, asked.side, asked.t5)
            else:
                made = convert(asked.trunk, asked.vqgan, asked.out, asked.text)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(f"{asked.out}: {', '.join(made) if made else 'nothing to do'}")


if __name__ == "__main__":
    main()
