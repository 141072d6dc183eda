"""How a run is spread over devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy


def build_strategy(name: str, module: L.LightningModule) -> str | Strategy:
    """The strategy by Lightning's name; `fsdp` gathers a large trunk a layer at a time.

    By its name alone Lightning wraps the whole model as one unit, which every device then holds at once.
    """
    from sjd2_lightning.models.pretrained import PretrainedBackbone

    backbone = getattr(module, "backbone", None)
    if name != "fsdp" or not isinstance(backbone, PretrainedBackbone):
        return name
    from lightning.pytorch.strategies import FSDPStrategy

    layers = {type(layer) for layer in backbone.trunk.layers}
    # an adapter trains some weights of a layer and not others, which needs the original parameters
    return FSDPStrategy(auto_wrap_policy=layers, use_orig_params=True, state_dict_type="full")
