"""From a prompt to a picture in Python: a model with the settings that `evaluate.py` would have.

>>> from sjd2_lightning import Pipeline
>>> pipeline = Pipeline.load()  # the shipped model; or a folder that training exported, or a name on the hub
>>> drawn = pipeline("red heart", seed=7)
>>> drawn.images[0].save("heart.png")
>>> print(drawn.passes, drawn.tokens_a_pass)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sjd2_lightning.cli.build import decoding_backbone
from sjd2_lightning.cli.check import check_evaluate
from sjd2_lightning.cli.evaluate import pick_device, weights_folder
from sjd2_lightning.cli.launch import composed
from sjd2_lightning.cli.settings import family_in, quoted, settings_keys
from sjd2_lightning.config.groups import did_you_mean, shipped
from sjd2_lightning.config.reading import model_choices
from sjd2_lightning.config.runs import EvaluateConfig
from sjd2_lightning.decoding import DecodeOutput, Observer, decode
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.models.glm_pixels import draw_pixels, load_pixels
from sjd2_lightning.models.hub import HubName, located
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.models.weights import ADAPTER_FILE, BACKBONE_FILE
from sjd2_lightning.run.stages import stage


@dataclass(frozen=True)
class Drawn:
    """Pictures, with what drawing them cost.

    Attributes:
        images: one picture a prompt.
        prompts: their texts.
        seeds: their seeds.
        output: their tokens and counts.
        seconds: time of decoding and of the model's own image decoder.
        pixel_seconds: time of a diffusion stage behind it (`model.pixels`); 0 where there is none.
    """

    images: tuple[Image.Image, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    output: DecodeOutput
    seconds: float
    pixel_seconds: float = 0.0

    @property
    def passes(self) -> list[int]:
        """Forward passes of each picture."""
        return self.output.stats.nfe.tolist()

    @property
    def tokens_a_pass(self) -> list[float]:
        """Tokens that a pass committed on average, for each picture."""
        return self.output.stats.step_compression.tolist()


class Pipeline:
    """A model that draws by any of the methods of its configuration.

    Args:
        backbone: the model.
        config: the settings, as those of an evaluation.
        weights: where its weights are from.
    """

    def __init__(self, backbone: Backbone, config: EvaluateConfig, weights: str) -> None:
        self.backbone, self.config, self.weights = backbone.eval(), config, weights
        self.layout = backbone.layout(*config.model.image_size)
        self.pixels: Any = None  # a stage of its own that makes pictures of codes
        if config.model.pixels is not None:
            with stage("loading the diffusion stage"):
                self.pixels = load_pixels(
                    shipped(config.model.pixels), getattr(torch, config.model.dtype), backbone.device
                )

    @classmethod
    def load(cls, source: str | Path | None = None, *keys: str) -> Pipeline:
        """The shipped model, or another one.

        Args:
            source: folder that training exported, folder of a low-rank adapter of the model that `keys`
                choose, or name of a repository on the hub that holds one of them or is a known release; None
                is what `model` says, which is the shipped model.
            keys: keys of `evaluate.py`, such as "model=lumina_mgpt" or "decoding.sampling.temperature=0.7".

        Raises:
            ValueError: a key that does not exist, a bad value, or weights that are missing or damaged; the
                message says how to get them.
        """
        return cls.of(evaluation_settings([*(_keys_of(source) if source is not None else ()), *keys]))

    @classmethod
    def of(cls, config: EvaluateConfig) -> Pipeline:
        """The model of a configuration; raises ValueError for weights that are missing or damaged."""
        folder, device = weights_folder(config), pick_device(config.device)
        backbone = decoding_backbone(config.model, folder, config.ckpt_path, device)
        is_own = config.weights == "model" or folder == config.model.folder
        named = config.model.path if is_own else str(folder)  # not where an installed package lies
        return cls(backbone, config, config.ckpt_path or config.model.adapter or named)

    def __call__(
        self,
        prompts: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        method: str = "sjd2",
        observer: Observer | None = None,
    ) -> Drawn:
        """Draws one picture a prompt.

        Args:
            prompts: one text, or several that are drawn together.
            seed: seed of the first picture, those behind it have the next ones; or one for each.
            method: name in `methods`; "ar" is token by token.
            observer: called after each forward pass.

        Raises:
            ValueError: for an unknown method, an empty prompt, or as many seeds as there are not prompts.
        """
        texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        seeds = tuple(range(seed, seed + len(texts))) if isinstance(seed, int) else tuple(seed)
        check_method(self.config, method)

        @torch.inference_mode()
        def draw() -> tuple[DecodeOutput, Tensor]:
            output = decode(self.backbone, texts, seeds, self.config.methods[method], self.layout, observer)
            return output, self.backbone.decode_images(output.image_ids, self.layout)

        (output, pixels), seconds = timed(draw, self.backbone.device)
        pixel_seconds = 0.0
        if self.pixels is not None:
            ids = output.image_ids
            pixels, pixel_seconds = timed(
                partial(draw_pixels, self.pixels, ids, self.layout, texts, seeds), self.backbone.device
            )
        images = tuple(Image.fromarray(each.numpy()) for each in to_uint8(pixels))
        return Drawn(images, texts, seeds, output, seconds, pixel_seconds)


def check_method(config: EvaluateConfig, method: str) -> None:
    """Raises ValueError for a name that is not in `methods`."""
    if method not in config.methods:
        raise ValueError(f"method {method!r}: {did_you_mean(method, list(config.methods))}")


def evaluation_settings(keys: Sequence[str]) -> EvaluateConfig:
    """The configuration of `evaluate.py` with these keys; raises ValueError with all problems."""
    return check_evaluate(composed("evaluate", list(keys)))


def _keys_of(source: str | Path) -> list[str]:
    """Keys that choose what lies in a folder or on the hub: a release, an adapter or an export."""
    name_on_hub = HubName.of(source)
    for name, fields in model_choices().items():
        if name_on_hub is not None and name_on_hub.hub_id == fields["hub_id"]:
            pin = [f"model.revision={name_on_hub.revision}"] if name_on_hub.revision else []
            return [f"model={name}", "model.local_files_only=false", "weights=model", *pin]
        if str(source).rstrip("/") == fields["path"]:
            return [f"model={name}", "weights=model"]
        if fields["get"] is not None and str(source) in fields["get"].split():
            raise ValueError(f"{source}: get it with `{fields['get']}`, then load {fields['path']!r}")
    folder = located(source, "source")
    if not folder.is_dir():
        raise ValueError(f"no backbone in {source}: there is no such folder")
    if (folder / ADAPTER_FILE).is_file():
        return [f"model.adapter={quoted(folder)}", "weights=model"]
    if not (folder / BACKBONE_FILE).is_file():
        raise ValueError(
            f"{source}: there is neither {BACKBONE_FILE} nor {ADAPTER_FILE}; give a folder that training "
            "exported or an adapter, or choose a released model by the key model="
        )
    return [f"model.family={family_in(folder)}", f"weights={quoted(folder)}", *settings_keys(folder)]
