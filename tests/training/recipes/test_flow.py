"""The recipe of a TarFlow: it learns, drops prompts while training alone, and saves what is read back."""

import pytest
import torch
from torch.utils.data import DataLoader

from sjd2_lightning.models.tarflow import FlowSizes, load_tarflow
from sjd2_lightning.training.recipes import FlowRecipe
from sjd2_lightning.training.recipes.clip import Pairs
from sjd2_lightning.training.recipes.flow import FlowModule
from tests.training.recipes.test_clip import quiet_trainer


class Scorer:
    name = "toy"

    def embed_captions(self, captions):
        return torch.stack([torch.tensor([len(text) / 20.0, float(len(text) % 2)]) for text in captions])


SIZES = FlowSizes(
    image_size=8, patch_size=2, width=16, num_blocks=2, num_layers=1, head_width=8, text_width=2
)


def batches(num: int):
    draw = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 8).expand(8, 3, 8, 8)
    noise = [0.1 * torch.rand(8, 3, 1, 1, generator=draw) for _ in range(num)]
    made = [Pairs((0.9 * ramp + part), ["cat", "dogs"] * 4) for part in noise]
    return DataLoader(made, batch_size=None)


def test_it_learns_and_saves(tmp_path):
    torch.manual_seed(0)
    module = FlowModule(FlowRecipe(SIZES), Scorer(), str(tmp_path), lr=5e-3)
    trainer = quiet_trainer(max_steps=40, limit_val_batches=1)
    before = trainer.validate(module, batches(1), verbose=False)[0]["val/bits_per_dim"]
    trainer.fit(module, batches(40), batches(1))
    assert float(trainer.callback_metrics["val/bits_per_dim"]) < before - 0.5
    saved = load_tarflow(tmp_path)
    assert torch.equal(saved.dropped_text, module.flow.dropped_text)


def test_prompts_are_dropped_while_training_alone():
    module = FlowModule(FlowRecipe(SIZES, prompt_dropout=0.5), Scorer())
    torch.manual_seed(0)
    dropped = (module.train().texts(["cat"] * 400) == module.flow.dropped_text).all(1)
    assert 150 < int(dropped.sum()) < 250
    assert not (module.eval().texts(["cat"] * 400) == module.flow.dropped_text).all(1).any()


def test_sizes_that_do_not_fit_the_text_encoder_are_refused():
    with pytest.raises(ValueError, match=r"tarflow\.sizes\.text_width=128: the vectors of toy have 2"):
        FlowModule(FlowRecipe(FlowSizes(image_size=8)), Scorer())
    with pytest.raises(ValueError, match=r"tarflow\.sizes\.image_size=9"):
        FlowModule(FlowRecipe(FlowSizes(image_size=9)), Scorer())
