"""Models of the published shapes with random weights, and milliseconds of one iteration of the engine.

Weights are drawn on the device in the type that they are used in and never loaded: a pass takes as long
whatever they say. How many drafts stand cannot be learnt from them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from sjd2_lightning.decoding import DecodingConfig, Sampling
from sjd2_lightning.decoding.loop import decoder_of
from sjd2_lightning.evaluation.auto_window import one_pass
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import Trunk
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.registry import family_of
from sjd2_lightning.models.small import JANUS_SIDE, SIZES

GUIDANCE = 3.0
PROMPT = "a red cat on a green sofa"
ENGINES = ("eager", "compiled", "graphs")


class Release(NamedTuple):
    """A published model.

    Attributes:
        family: name in the registry.
        sizes: sizes of the trunk.
        pixels: side of the image.
        options: further arguments of the family's builder.
        window: window of the paper's table; assumed for Janus, whose window was not found.
        compression: published tokens a pass.
    """

    family: str
    sizes: Mapping[str, int]
    pixels: int
    options: Mapping[str, int]
    window: int
    compression: float


def _sizes(layers: int, intermediate: int, key_heads: int) -> dict[str, int]:
    return {
        "hidden_size": 4096,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": key_heads,
    }


RELEASES = {
    "lumina": Release("chameleon", _sizes(32, 11008, 32), 768, {}, 96, 4.02),
    "emu3": Release("emu3", _sizes(32, 14336, 8), 720, {}, 128, 5.62),
    "janus": Release("janus", _sizes(30, 11008, 32), 384, {"side": 24}, 32, 4.0),
}
SMALL = {
    "lumina": Release("chameleon", SIZES, 64, {}, 4, 4.02),
    "emu3": Release("emu3", SIZES, 64, {}, 4, 5.62),
    "janus": Release("janus", SIZES, 16 * JANUS_SIDE, {}, 4, 4.0),
}


@dataclass
class Bench:
    """What the parts share: the device, the sizes, the model that is there now, what was found so far.

    Attributes:
        device: device of the models.
        smoke: two layers and tiny sizes.
        found: results of the parts, by name.
        bandwidth: bytes a second that the device copies, from the part `card`; None = not measured.
    """

    device: torch.device
    smoke: bool
    found: dict[str, Any] = field(default_factory=dict)
    _held: tuple[str, PretrainedBackbone] | None = None

    @property
    def releases(self) -> dict[str, Release]:
        return SMALL if self.smoke else RELEASES

    @property
    def windows(self) -> list[int]:
        return [1, 4] if self.smoke else [1, 16, 32, 64, 96, 128]

    @property
    def many(self) -> int:
        """Number of rows of the large batch."""
        return 2 if self.smoke else 16

    @property
    def fastest(self) -> str:
        """The fastest engine that the device runs and that a smoke test has time for."""
        return "graphs" if self.device.type == "cuda" else "eager"

    def model(self, name: str) -> PretrainedBackbone:
        """A model of `releases`; the one before it goes, since two do not fit."""
        if self._held is None or self._held[0] != name:
            self.drop()
            self._held = name, build(self.releases[name], self.device)
        return self._held[1]

    def drop(self) -> None:
        """Lets the model that is there go."""
        self._held = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def build(release: Release, device: torch.device) -> PretrainedBackbone:
    """A model in bfloat16 with random weights, made on the device.

    Args:
        release: shape of the model.
        device: device that the weights are drawn on.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device, torch.no_grad():
            made = family_of(release.family).shrunken(0, release.sizes, **release.options)
    finally:
        torch.set_default_dtype(before)
    return made.to(device=device, dtype=torch.bfloat16).eval().requires_grad_(False)


def config_of(window: int, guided: bool, engine: str, **values: Any) -> DecodingConfig:
    """Plain autoregression for a window of 1, else SJD2 by replay with one level."""
    sampling = Sampling(top_k=2000, guidance_scale=GUIDANCE if guided else 1.0)
    kind = ("ar", 1, 0) if window == 1 else ("sjd2", window, 1)
    return DecodingConfig(*kind, engine=engine, sampling=sampling, **values)  # type: ignore[arg-type]


def milliseconds(call: Callable[[], object], device: torch.device, calls: int = 10, groups: int = 3) -> float:
    """Median over groups of the milliseconds of a call, several in a row.

    On CUDA between two events, with the device synchronised behind each group only, as while decoding.
    """
    if device.type != "cuda":
        return 1000 * float(np.median([timed(call)[1] for _ in range(groups)]))
    found = []
    for _ in range(groups):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / calls)
    return float(np.median(found))


@torch.inference_mode()
def pass_ms(backbone: PretrainedBackbone, config: DecodingConfig, rows: int, pixels: int) -> float:
    """Milliseconds of an iteration in the middle of an image.

    Args:
        backbone: the model.
        config: the method; its engine runs the pass.
        rows: number of images.
        pixels: side of the images.
    """
    call = one_pass(backbone, config, [PROMPT] * rows, backbone.layout(pixels, pixels), config.num_drafted)
    for _ in range(3):  # compiles, captures, and settles the allocator
        call()
    try:
        return milliseconds(call, backbone.device)
    finally:
        decoder_of(backbone).release()


def own_ms(backbone: PretrainedBackbone, config: DecodingConfig, rows: int, pixels: int) -> float:
    """The same without trunk and head: hidden states are what was fed, logits are some that lie ready."""
    copies = 1 if config.sampling.guidance_scale == 1 else 2
    ready = torch.randn(copies * rows, config.size, backbone.num_codes, device=backbone.device)
    ready = ready.to(torch.bfloat16)

    class Idle(Trunk):
        def run(self, embeddings: Tensor, *_: object) -> Tensor:
            return embeddings

        def head(self, hidden: Tensor) -> Tensor:
            return ready[: len(hidden), : hidden.shape[1]]

    with (
        patch.dict(decoder_of(backbone).trunks, clear=True),
        patch.object(type(backbone), "decoding_trunk", lambda *_: Idle(backbone, compiled=False)),
    ):
        return pass_ms(backbone, config, rows, pixels)


def bytes_read(backbone: PretrainedBackbone, config: DecodingConfig, rows: int, pixels: int) -> int:
    """Bytes that a pass must read: weights of the layers and of the head, and the cache of half an image."""
    copies = 1 if config.sampling.guidance_scale == 1 else 2
    layers = sum(weight.numel() * weight.element_size() for weight in backbone.trunk.layers.parameters())
    head = backbone.num_codes * backbone.hidden_size * 2
    columns = backbone.layout(pixels, pixels).num_slots // 2
    return layers + head + copies * rows * columns * backbone.new_cache(1, 1).num_bytes
