"""Low-rank adapters (LoRA, arXiv 2106.09685) on a backbone's trunk, through peft.

The adapter is put into the model's own linear layers, so that nothing else needs to know of it. On disk it is
a peft folder: `PeftModel.from_pretrained(model, folder)` reads it without this package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sjd2_lightning.run.values import Within, wrong_values

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in peft's folders


@dataclass(frozen=True)
class LoraSettings:
    """Sizes of the adapter.

    Attributes:
        rank: rank of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: share of the adapter's input that is dropped while it is trained.
        targets: names of the linear layers in every layer of the trunk that get an update.
    """

    rank: Annotated[int, Within(1, 2**14)] = 16
    alpha: Annotated[float, Within(0, 1e6, without="least")] = 32.0
    dropout: Annotated[float, Within(0, 1, without="most")] = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if not self.targets:
            found.append("targets=[]: give at least one linear layer; model.peft=null trains all weights")
        return found


def add_lora(model: nn.Module, trunk_path: str, settings: LoraSettings) -> None:
    """Puts a new adapter into a model's trunk, which changes nothing before it is trained.

    Everything else is frozen.

    Args:
        model: model of transformers.
        trunk_path: name of its trunk inside it.
        settings: sizes.

    Raises:
        ValueError: if a target names no linear layer of the trunk.
    """
    # models with adapters are rare, and peft takes seconds to import
    from peft import LoraConfig, inject_adapter_in_model

    layers = rf"{re.escape(trunk_path)}\.layers\.\d+\.\w+\."
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if unknown := [
        target
        for target in settings.targets
        if not any(re.fullmatch(layers + re.escape(target), name) for name in names)
    ]:
        raise ValueError(f"model.lora.targets: the trunk's layers have no linear layer {', '.join(unknown)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=layers + f"({'|'.join(map(re.escape, settings.targets))})",
    )
    inject_adapter_in_model(config, model.requires_grad_(False))


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter was put into a model, or into the model of a backbone."""
    return any(hasattr(part, "peft_config") for part in (module, *module.children()))


def save_adapter(model: Any, folder: str | Path) -> None:
    """Writes the adapter alone as a peft folder."""
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(folder)
    state = get_peft_model_state_dict(model)
    tensors = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / _WEIGHTS, {"format": "pt"})


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Puts a saved adapter into a model, to be used or trained on; everything else is frozen.

    Raises:
        ValueError: if the folder holds no adapter, or one of another model.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    folder = Path(folder)
    for name in ("adapter_config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"model.adapter={folder}: {name} is missing; give a folder that training exported"
            )
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    state = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / _WEIGHTS).items()}
    inject_adapter_in_model(config, model.requires_grad_(False))
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    result = set_peft_model_state_dict(model, state)
    if result.unexpected_keys or wanted & set(result.missing_keys):
        raise ValueError(f"model.adapter={folder}: this adapter is of another model or other sizes")


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with its adapter added to the weights, under the model's own names."""
    if not has_adapter(model):
        return model.state_dict()
    from peft.tuners.lora import LoraLayer

    deltas = {
        f"{name}.base_layer.weight": module.get_delta_weight("default")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    return {
        name.replace(".base_layer.", "."): value + deltas[name].to(value.dtype) if name in deltas else value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
