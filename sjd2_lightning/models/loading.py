"""Reading a saved backbone, or a plain Hugging Face folder, into the parts of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sjd2_lightning.models.sources import TEXT, check_folder, read_backbone_file


@dataclass(frozen=True)
class LoadOptions:
    """How weights are read.

    Attributes:
        dtype: of the trunk; image tokenizers stay in single precision.
        device: to load straight onto; None is the main memory.
        unconditional: replaces the family's context of guidance; None keeps it.
        remedy: what an error about missing files tells the reader to do.
    """

    dtype: torch.dtype = torch.float32
    device: str | None = None
    unconditional: str | None = None
    remedy: str = "set model.path and model.trunk"

    def tokens(self, defaults: Any, fields: dict[str, Any]) -> Any:
        """Control tokens: the family's defaults, then what the folder says, then what is asked for."""
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
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
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict[str, Any]]:
    """Model, text tokenizer and control-token fields of a saved backbone or a plain Hugging Face folder.

    Args:
        model_class: of transformers.
        folder: with `backbone.json`, or in Hugging Face layout.
        trunk: sub-folder of a saved backbone, or any other path to the trunk's weights.
        family: that the folder must be of.
        optional: prefixes of keys that a checkpoint may lack, since nothing here reads those weights.

    Raises:
        ValueError: if a part is missing, of another family, or does not fit the model; the message names it.
    """
    fields = read_backbone_file(folder, family)
    trunk_folder, text_folder = folder, folder
    if fields:
        elsewhere = Path(trunk).is_dir() and not (folder / trunk).is_dir()
        trunk_folder = Path(trunk) if elsewhere else folder / trunk
        text_folder = folder / TEXT
    check_folder(trunk_folder, model_class.config_class.model_type, options.remedy)
    if not (text_folder / "tokenizer.json").is_file():
        raise ValueError(
            f"no backbone in {folder}: {text_folder / 'tokenizer.json'} is missing; {options.remedy}"
        )
    model = _load_model(model_class, trunk_folder, options, optional)
    # the class that a release names may build its tokenizer anew; tokenizer.json is what it was trained with
    text = PreTrainedTokenizerFast.from_pretrained(text_folder, local_files_only=True)
    return model, text, fields


def _load_model(
    model_class: Any, folder: Path, options: LoadOptions, optional: tuple[str, ...]
) -> PreTrainedModel:
    config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    # Emu3's class has 0.1 unless told otherwise: the law would differ between training and decoding
    config.get_text_config().attention_dropout = 0.0
    try:
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
    except (OSError, RuntimeError, ValueError) as error:
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
