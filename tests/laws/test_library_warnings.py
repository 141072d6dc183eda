"""What a user cannot mend is not shown: decoding and training raise no warning of a library."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from transformers.utils import logging as transformers_logging

from sjd2_lightning.cli.trainer import quiet_lightning
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import FAMILIES, build_shrunken, load_backbone
from sjd2_lightning.models.trunk import cache_argument
from sjd2_lightning.training.module import SJD2Module, TrainingNoise
from sjd2_lightning.training.optimizer import OptimizerConfig
from tests.training.test_module import QUIET, Batch, loader

LIBRARIES = ("transformers", "diffusers", "peft", "torch")
SIDES = {"chameleon": 32, "emu3": 16, "janus": 64, "simple_ar": 32, "glm_image": 64, "llamagen": 64}


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Warnings become errors; what libraries log as a warning is noted."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(f"{record.name}: {record.getMessage()}")  # type: ignore[method-assign]
    type(transformers_logging.get_logger()).warning_once.cache_clear()
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ResourceWarning)  # of tests before this one
            quiet_lightning()
            # the loader of this test, not of the command
            warnings.filterwarnings("ignore", r".*does not have many workers")
            yield found
    finally:
        for name in LIBRARIES:
            logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_used_as_its_library_wants(family, tmp_path):
    side = SIDES[family]
    with complaints() as found:
        backbone = build_shrunken(family)
        layout = backbone.layout(side, side)
        config = DecodingConfig("sjd2", window=8, num_levels=1, sampling=Sampling(guidance_scale=2.0))
        image_ids = decode(backbone, ["red", "a blue cat"], [0, 1], config, layout).image_ids
        backbone.decode_images(image_ids, layout)
        module = SJD2Module(backbone, TrainingNoise(), OptimizerConfig(lr=1e-3), image_size=(side, side))
        batches = loader([Batch(["red", "a blue cat"], image_ids)])
        L.Trainer(max_steps=1, **QUIET).fit(module, batches, batches)
        # GLM-Image has gate and up in one
        targets = ("q_proj", "gate_up_proj") if family == "glm_image" else LoraSettings().targets
        backbone.add_lora(LoraSettings(targets=targets))
        backbone.checkpoint_activations()
        module = SJD2Module(backbone, TrainingNoise(), OptimizerConfig(lr=1e-3), image_size=(side, side))
        L.Trainer(max_steps=1, **QUIET).fit(module, batches, batches)
        backbone.save(tmp_path)
        load_backbone(family, tmp_path)
    assert not found


def test_a_wrong_name_of_the_cache_is_seen():
    """What the test above would show: the name that is not the one of the signature warns."""
    trunk = build_shrunken("chameleon").trunk
    if cache_argument(trunk) != "cache":
        pytest.skip("this transformers knows the old name only")
    with complaints(), pytest.raises(FutureWarning, match="past_key_values"):
        trunk(inputs_embeds=torch.zeros(1, 1, trunk.config.hidden_size), past_key_values=None)
    with complaints() as found:
        transformers_logging.get_logger("transformers.models").warning_once("a notice")
    assert found == ["transformers.models: a notice"]
