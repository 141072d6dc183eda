"""Adapters through peft: new low-rank ones (LoRA, arXiv 2106.09685) on a trunk, and saved ones of any kind.

The adapter is put into the model's own layers, so that nothing else needs to know of it, and is merged into
plain weights by peft, but for one of noise alone (`noise_gate`). On disk it is a peft folder:
`PeftModel.from_pretrained(model, folder)` reads it without this package, and lets it act on all tokens.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sjd2_lightning.models.noise_gate import NOISY_ONLY, NoiseGate
from sjd2_lightning.models.weights import finite, open_weights, read_json
from sjd2_lightning.run.values import Within, wrong_values

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in peft's folders


@dataclass(frozen=True)
class LoraSettings:
    """Sizes of the adapter.

    Attributes:
        rank: rank of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: share of the adapter's input that is dropped while it is trained.
        targets: names of the linear layers in every layer of the trunk that get an update.
        noisy_only: whether it acts on noisy tokens alone, so that clean input has the law of the weights as
            they were; such an adapter is never merged, see `noise_gate`.
    """

    rank: Annotated[int, Within(1, 2**14)] = 16
    alpha: Annotated[float, Within(0, 1e6, without="least")] = 32.0
    dropout: Annotated[float, Within(0, 1, without="most")] = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    noisy_only: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if not self.targets:
            found.append("targets=[]: give at least one linear layer; model.peft=null trains all weights")
        return found


def add_lora(
    model: nn.Module, trunk_path: str, settings: LoraSettings, layers: str = "layers"
) -> NoiseGate | None:
    """Puts a new adapter into a model's trunk, which changes nothing before it is trained.

    Everything else is frozen.

    Args:
        model: model of transformers.
        trunk_path: name of its trunk inside it.
        settings: sizes.
        layers: what the trunk calls its layers.

    Returns:
        The gate of an adapter that acts on noisy tokens alone.

    Raises:
        ValueError: if a target names no linear layer of the trunk.
    """
    _refuse_second(model)
    # models with adapters are rare, and peft takes seconds to import
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    path = rf"{re.escape(trunk_path)}\.{layers}\.\d+\.\w+\."
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    if unknown := [
        target
        for target in settings.targets
        if not any(re.fullmatch(path + re.escape(target), name) for name in linear)
    ]:
        raise ValueError(f"model.lora.targets: the trunk's layers have no linear layer {', '.join(unknown)}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=path + f"({'|'.join(map(re.escape, settings.targets))})",
        # GPT-2 holds the transpose of a linear map's weights
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    inject_adapter_in_model(config, model.requires_grad_(False))
    return NoiseGate(model) if settings.noisy_only else None


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter was put into a model, or into the model of a backbone."""
    return any(hasattr(part, "peft_config") for part in (module, *module.children()))


def _refuse_second(model: nn.Module) -> None:
    if has_adapter(model):
        raise ValueError(
            "model.peft, model.adapter: the model has an adapter that acts on noisy tokens alone, and takes "
            "no second one; set both to null, or model.lora.noisy_only=true and model.adapter=null, to go on "
            "with the one it has"
        )


def save_adapter(model: Any, folder: str | Path, noisy_only: bool = False) -> None:
    """Writes the adapter alone as a peft folder, which says whether it acts on noisy tokens alone."""
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(folder)
    state = get_peft_model_state_dict(model)
    tensors = {_PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / _WEIGHTS, {"format": "pt", **({NOISY_ONLY: "true"} if noisy_only else {})})


def holds_noisy_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that acts on noisy tokens alone."""
    if not (folder / _WEIGHTS).is_file():
        return False
    with open_weights(folder / _WEIGHTS) as file:
        return NOISY_ONLY in (file.metadata() or {})


def load_adapter(model: nn.Module, folder: str | Path) -> NoiseGate | None:
    """Puts a saved adapter of any kind that peft can merge into a model, to be used or trained on.

    Everything else is frozen.

    Returns:
        The gate of an adapter that acts on noisy tokens alone.

    Raises:
        ValueError: if the folder holds no adapter, one of another model, one that peft cannot put into it
            or one that could not be merged into plain weights after training.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    _refuse_second(model)
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"model.adapter={folder}: {name} is missing; give a folder that training exported"
            )
    read_json(folder / _CONFIG)
    with open_weights(folder / _WEIGHTS) as file:
        state = {
            name.removeprefix(_PREFIX): finite(name, file.get_tensor(name), folder / _WEIGHTS)
            for name in file.keys()  # noqa: SIM118  no dictionary
        }
    plain = set(model.state_dict())
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        inject_adapter_in_model(config, model.requires_grad_(False))
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        result = set_peft_model_state_dict(model, state)
    except Exception as error:  # each kind of peft's has its own
        if "size mismatch" in str(error):
            raise ValueError(_foreign(folder)) from error
        raise ValueError(f"model.adapter={folder}: peft cannot put it into this model: {error}") from error
    if result.unexpected_keys or wanted & set(result.missing_keys):
        raise ValueError(_foreign(folder))
    if holds_noisy_adapter(folder):
        return NoiseGate(model)
    if problem := _merge_problem(model, plain):
        raise ValueError(
            f"model.adapter={folder}: {problem}, so what is trained of this {kind} could not be exported; "
            "merge it with its own tool first, or take an adapter of another kind"
        )
    return None


def _foreign(folder: Path) -> str:
    return f"model.adapter={folder}: this adapter is of another model or other sizes"


def plain_state(model: nn.Module, merged: bool = True) -> dict[str, Tensor]:
    """The state of a model under its own names, its adapter merged into the weights by peft or left out."""
    adapted = _adapted(model)
    state = {name: value for name, value in model.state_dict().items() if not _inside(name, adapted)}
    for name, module in adapted.items():
        plain = _merged(module) if merged else _base(module)
        state |= {f"{name}.{own}": value for own, value in plain.state_dict().items()}
    return state


def layers_alike(layers: Iterable[nn.Module]) -> bool:
    """Whether layers differ by the values of their weights alone: an adapter may change some of them only."""
    kinds = set()
    for layer in layers:
        shapes = [(name, tuple(value.shape)) for name, value in layer.named_parameters()]
        factors = [repr(getattr(part, "scaling", None)) for part in layer.modules()]
        kinds.add(repr((shapes, factors)))
    return len(kinds) <= 1


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """What peft put around modules of a model, by name; not what lies inside such a module."""
    if not has_adapter(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not _inside(name, found):
            found[name] = module
    return found


def _inside(name: str, modules: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))


@torch.no_grad()
def _merged(module: Any) -> nn.Module:
    """The plain module that peft makes of one with an adapter; the latter is left as it is."""
    own = copy.deepcopy(module)
    if hasattr(own, "unload_and_optionally_merge_module"):
        return own.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    own.merge(safe_merge=True)
    return own.get_base_layer()


@torch.no_grad()
def _merge_problem(model: nn.Module, plain: set[str]) -> str:
    """Why the adapter cannot become plain weights of the names `plain`; "" if it can.

    Of each kind of module one is merged and held against itself.
    """
    adapted, kinds = _adapted(model), set()
    names = {name for name in model.state_dict() if not _inside(name, adapted)}
    for name, module in adapted.items():
        try:
            merged = _merged(module) if type(module) not in kinds else _base(module)
            names |= {f"{name}.{own}" for own in merged.state_dict()}
            if type(module) not in kinds and not _same(copy.deepcopy(module).eval(), merged.eval()):
                return f"peft's merge of {name} gives another layer"
        except Exception as error:  # each kind of peft's has its own
            return f"peft cannot merge {name} ({type(error).__name__}: {error})"
        kinds.add(type(module))
    if names != plain:
        return f"it changes the model's structure ({len(names ^ plain)} weights more or fewer)"
    return ""


def _base(module: Any) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module.original_module


def _same(adapted: nn.Module, merged: nn.Module) -> bool:
    """Whether both give the same for a few inputs; linear maps and embeddings are asked, others are not."""
    weight = getattr(merged, "weight", None)
    if isinstance(merged, nn.Embedding):
        given: Tensor = torch.arange(min(64, merged.num_embeddings), device=merged.weight.device)
    elif isinstance(merged, nn.Linear):
        rng = torch.Generator().manual_seed(0)
        given = torch.randn(4, merged.in_features, generator=rng).to(merged.weight)
    else:
        return True
    assert weight is not None
    wanted, found = adapted(given).float(), merged(given).float()
    tolerance = 1e-3 if weight.dtype == torch.float32 else 0.05
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
