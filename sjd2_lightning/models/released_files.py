"""Files that a conversion reads and writes: weights as they are published, a folder with its manifest."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from sjd2_lightning.models.image_tokenizer import VQImageTokenizer
from sjd2_lightning.models.weights import INDEX, TOKENIZER, damage, indexed_files, open_weights, read_json
from sjd2_lightning.run.files import sha256_of_file, whole_file, write_whole

MANIFEST = "manifest.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
# what training leaves beside a model's weights, and the copy in another layout that some releases have
_NO_WEIGHTS = (
    "adapter_model.*",
    "consolidated*",
    "training_args.*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def read_pickle(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name of a `.ckpt` or `.bin` file, read without running what it may contain.

    Raises:
        ValueError: if the file holds anything but tensors and plain values.
    """
    try:
        # options of a training stand beside some weights; they are plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        why = damage(Path(path)) or f"{str(error).splitlines()[0]}: it holds more than tensors, or is damaged"
        raise ValueError(f"{path} cannot be read safely ({why}); get the original file again") from error
    state = content
    for place in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(place), Mapping):
            state = content[place]
            break
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return dict(state)


def shards_of(folder: Path) -> list[Path]:
    """Weight files of a folder, safetensors before pickles: those that its index names, else all of a model.

    Raises:
        ValueError: there are none, or one that the index names is missing.
    """
    for pattern, index in (("*.safetensors", folder / INDEX), ("*.bin", folder / _PICKLE_INDEX)):
        found = sorted(
            path for path in folder.glob(pattern) if not any(path.match(other) for other in _NO_WEIGHTS)
        )
        if found and index.is_file():
            named = indexed_files(index)
            if missing := [path.name for path in named if not path.is_file()]:
                raise ValueError(f"{index} names {', '.join(missing)}, not there: download the folder again")
            return named
        if found:
            return found
    raise ValueError(f"--trunk {folder}: there are no *.safetensors and no *.bin")


def read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a weight file, one at a time where the format allows it."""
    if path.suffix == ".bin":
        yield from read_pickle(path).items()
        return
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118  no dictionary
            yield name, file.get_tensor(name)


def names_of(path: Path) -> list[str]:
    """Names of the tensors in a weight file."""
    if path.suffix == ".bin":
        return list(read_pickle(path))
    with open_weights(path) as file:
        return list(file.keys())


def check_names(found: set[str], wanted: set[str], where: str) -> None:
    """Raises ValueError naming weights that are unknown or missing."""
    unknown, missing = sorted(found - wanted), sorted(wanted - found)
    if unknown or missing:
        parts = [f"unknown {', '.join(unknown)}"] if unknown else []
        parts += [f"missing {', '.join(missing)}"] if missing else []
        raise ValueError(f"the weights in {where} do not fit config.json: {'; '.join(parts)}")


class Writer:
    """Files of the converted folder, each written in one go and noted in the manifest; `made` are new."""

    def __init__(self, out: Path) -> None:
        self.out, self.made = out, list[str]()
        out.mkdir(parents=True, exist_ok=True)
        path = out / MANIFEST
        self.files: dict[str, Any] = read_json(path)["files"] if path.is_file() else {}

    def write(self, name: str, source: str, make: Callable[[Path], object]) -> None:
        """Makes a file unless it is there and was made of the same source.

        Args:
            name: relative to the folder.
            source: what identifies the content; a change of it makes the file again.
            make: writes the content to a path.
        """
        path = self.out / name
        noted = self.files.get(name)
        if noted and noted["source"] == source and path.is_file() and path.stat().st_size == noted["bytes"]:
            return
        with whole_file(path) as part:
            make(part)
        self.files[name] = {"source": source, "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        write_whole(self.out / MANIFEST, json.dumps({"files": self.files}, indent=2, sort_keys=True) + "\n")
        self.made.append(name)


def write_tokenizer(writer: Writer, vq: VQModel, source: Path) -> None:
    """Writes an image tokenizer made from a file."""
    folder = writer.out / TOKENIZER

    def save(path: Path) -> None:
        VQImageTokenizer(vq).save(folder, half=False)
        (folder / "diffusion_pytorch_model.safetensors").rename(path)

    writer.write(f"{TOKENIZER}/diffusion_pytorch_model.safetensors", sha256_of_file(source), save)
