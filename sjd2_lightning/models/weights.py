"""Where a model's weights lie, and how a saved backbone or a plain Hugging Face folder is read."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class LoadOptions:
    """How weights are read.

    Attributes:
        dtype: type of the trunk's numbers; image tokenizers stay in single precision.
        device: to load straight onto; None is the main memory.
        unconditional: replaces the family's context of guidance; None keeps it.
        remedy: what an error about missing files tells the reader to do.
    """

    dtype: torch.dtype = torch.float32
    device: str | None = None
    unconditional: str | None = None
    remedy: str = "set model.path and model.trunk"

    def tokens(self, defaults: Any, fields: dict[str, Any], folder: str | Path) -> Any:
        """Control tokens: the family's defaults, then what a folder says, then what is asked for.

        Raises:
            ValueError: the folder says something unknown, or of another type.
        """
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        names = vars(defaults)
        for name, value in known.items():
            if name not in names or type(value) is not type(names[name]):
                wrong = "is not known" if name not in names else f"is no {type(names[name]).__name__}"
                raise ValueError(
                    f"{Path(folder) / BACKBONE_FILE}: the field {name}={value!r} {wrong}; known are "
                    f"{', '.join(names)}"
                )
        if self.unconditional is not None:
            known["unconditional"] = self.unconditional
        return replace(defaults, **known)


def load_parts(
    model_class: Any,
    folder: Path,
    trunk: str,
    family: str,
    options: LoadOptions,
    optional: tuple[str, ...] = (),
    places: tuple[str, str] = ("", ""),
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """Model, text tokenizer and control-token fields of a saved backbone or a plain Hugging Face folder.

    Args:
        model_class: class of transformers.
        folder: with `backbone.json`, or in Hugging Face layout.
        trunk: sub-folder of a saved backbone, or any other path to the trunk's weights.
        family: family that the folder must be of.
        optional: prefixes of keys that a checkpoint may lack, since nothing here reads those weights.
        places: sub-folders of a release with weights and text tokenizer.

    Raises:
        ValueError: if a part is missing, of another family, or does not fit the model; the message names it.
    """
    from transformers import (
        PreTrainedTokenizerFast,  # seconds, which the typed configuration need not wait for
    )

    fields = read_backbone_file(folder, family)
    trunk_folder, text_folder = (folder / place for place in places)
    if fields:
        elsewhere = Path(trunk).is_dir() and not (folder / trunk).is_dir()
        trunk_folder = Path(trunk) if elsewhere else folder / trunk
        text_folder = folder / TEXT
    check_folder(trunk_folder, model_class.config_class.model_type, options.remedy)
    if not (text_folder / "tokenizer.json").is_file():
        raise ValueError(
            f"no backbone in {folder}: {text_folder / 'tokenizer.json'} is missing; {options.remedy}"
        )
    for path in (text_folder / name for name in _TEXT_JSON):
        if path.is_file():
            read_json(path)
    model = _load_model(model_class, trunk_folder, options, optional)
    try:
        # the class that a release names may build it anew; tokenizer.json is what it was trained with
        text = PreTrainedTokenizerFast.from_pretrained(text_folder, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{text_folder / 'tokenizer.json'} is no text tokenizer: {error}") from error
    return model, text, fields


def _load_model(
    model_class: Any, folder: Path, options: LoadOptions, optional: tuple[str, ...]
) -> PreTrainedModel:
    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
        # Emu3's class has 0.1 unless told otherwise: the law would differ between training and decoding
        config.get_text_config().attention_dropout = 0.0
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=options.dtype,
            device_map=options.device,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # checks of configurations and of files have their own kinds
        raise ValueError(f"the weights in {folder} do not fit their config.json: {error}") from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(optional))
    unknown = sorted(info["unexpected_keys"])
    if missing or unknown:
        shown = [f"missing {key}" for key in missing[:3]] + [f"unknown {key}" for key in unknown[:3]]
        raise ValueError(
            f"the weights in {folder} are not those of {model_class.__name__}: {len(missing)} keys missing, "
            f"{len(unknown)} unknown ({', '.join(shown)}); {options.remedy}"
        )
    return model.eval()


INDEX = "model.safetensors.index.json"
_TEXT_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_AGAIN = "download it again (`git lfs pull` in a clone, or `hf download`)"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file and what it is instead.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    why = damage(path)
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        why = "it begins with a byte-order mark: save it as UTF-8 without one"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        why = why or str(error)
    else:
        why = why or ("" if isinstance(found, dict) else f"a {type(found).__name__} where an object belongs")
    if why:
        raise ValueError(f"{path} cannot be read: {why}; mend it, or {_AGAIN}")
    return found


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file, as `safe_open` gives it.

    Raises:
        ValueError: naming the file, if it is cut off, damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {damage(path) or error}; {_AGAIN}") from error


def damage(path: Path) -> str:
    """What a file is that stands in for another one: nothing, git's pointer, a web page; else ""."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:
        return ""
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is the pointer that git-lfs leaves in place of a large file"
    return "it is a web page" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else ""


def finite(name: str, value: Tensor, where: Path | str) -> Tensor:
    """A weight as it is.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    if value.isfinite().all():
        return value
    raise ValueError(
        f"{where}: the weight {name} holds NaN or infinity; get the file again, or ask its maker"
    )


def indexed_files(index: Path) -> list[Path]:
    """The weight files that an index names, in the order of their names.

    Raises:
        ValueError: it is no index, or names a file outside its folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no `weight_map` of file names; {_AGAIN}")
    if outside := sorted(name for name in set(names.values()) if Path(name).name != name):
        raise ValueError(f"{index} names {outside[0]}, which is no file of its folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def check_once(names: dict[Path, list[str]]) -> None:
    """Refuses a weight that two files hold.

    Args:
        names: names of the weights in each file.

    Raises:
        ValueError: naming the weight and both files.
    """
    holder: dict[str, Path] = {}
    for path, found in names.items():
        for name in found:
            if name in holder:
                raise ValueError(
                    f"{path.parent}: {holder[name].name} and {path.name} both hold {name}; remove the one "
                    "that is not of this model"
                )
            holder[name] = path


BACKBONE_FILE = "backbone.json"  # in folders that this package wrote: family and control tokens
SETTINGS_FILE = "settings.json"  # there too: size of the images and sampling that training drew them with
ADAPTER_FILE = "adapter_config.json"  # in folders of low-rank adapters, as peft writes them
TRUNK, TEXT, TOKENIZER, ADAPTER = "trunk", "text", "tokenizer", "adapter"  # their sub-folders


def missing_weights(folder: Path) -> list[str]:
    """Names of the safetensors files that a folder in Hugging Face layout lacks, its config included."""
    files = [path.name for path in _named_files(folder)]
    return [name for name in ("config.json", *files) if not (folder / name).is_file()]


def _named_files(folder: Path) -> list[Path]:
    """The weight files of a folder in Hugging Face layout, whether they are there or not."""
    index = folder / INDEX
    return indexed_files(index) if index.is_file() else [folder / "model.safetensors"]


def check_folder(folder: Path, model_type: str, remedy: str) -> None:
    """Refuses a folder that does not hold the safetensors of a model of one type.

    Args:
        folder: in Hugging Face layout.
        model_type: that its config.json must have.
        remedy: what the reader can do about it.

    Raises:
        ValueError: naming what is missing, a file that is broken, or the family that the folder is of.
    """
    if missing := missing_weights(folder):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        why = (
            f" (it has {', '.join(pickles)}, but a pickle can run code while it is read: safetensors only)"
            if pickles
            else ""
        )
        raise ValueError(f"no backbone in {folder}: {', '.join(missing)} missing{why}; {remedy}")
    found = read_json(folder / "config.json").get("model_type")
    if found != model_type:
        raise ValueError(f"{folder} holds a model of type {found!r}, not {model_type!r}; {remedy}")
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    if (folder / "adapter_config.json").is_file():  # transformers would put it into the model unasked
        raise ValueError(
            f"{folder} holds adapter_config.json beside a model's weights: move the adapter away, or give "
            "its folder as model.adapter"
        )
    files = _named_files(folder)
    single = folder / "model.safetensors"
    if single.is_file() and single not in files:  # transformers would read it in place of the index
        raise ValueError(f"{folder} has {single.name}, and {INDEX} does not name it: remove one of the two")
    names = {}
    for path in files:
        with open_weights(path) as file:
            names[path] = list(file.keys())
    check_once(names)


def read_backbone_file(folder: Path, family: str) -> dict[str, object]:
    """Fields of `backbone.json`; empty for a folder in plain Hugging Face layout.

    Raises:
        ValueError: if the folder is of another family.
    """
    path = folder / BACKBONE_FILE
    if not path.is_file():
        return {}
    fields = read_json(path)
    found = fields.pop("family", None)
    if found != family:
        raise ValueError(f"{path} is of the family {found!r}, not {family!r}; set model.family to {found}")
    return fields
