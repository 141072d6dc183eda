"""The recipe of the image tokenizers: pictures of every source, k-means, and a decoder that learns alone."""

import lightning as L
import pytest
import torch

from sjd2_lightning.data import DataConfig
from sjd2_lightning.training.recipes import TokenizerRecipe
from sjd2_lightning.training.recipes.tokenizer import PictureData, TokenizerModule, kmeans

SIZES = {"num_codes": 16, "code_dim": 4, "channels": (8,), "patch": 8, "warmup_steps": 1}
SCENES = DataConfig("data", source="scenes", num_scenes=6, num_nouns=12, aligned=True, batch_size=2)


def fitted(recipe: TokenizerRecipe, folder: str) -> TokenizerModule:
    L.seed_everything(0)
    module = TokenizerModule(recipe, 1e-2, folder)
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, PictureData(SCENES, 64).train_dataloader())
    return module


def test_kmeans_finds_separate_groups_and_bears_fewer_vectors_than_centres():
    groups = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = 0.01 * torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    centres = kmeans(groups.repeat(30, 1) + noise, 3)
    assert torch.cdist(groups, centres).min(1).values.max() < 0.02
    assert kmeans(groups, 5).shape == (5, 2)


@pytest.mark.parametrize(("data", "num_batches"), [(SCENES, 3), (DataConfig("data", batch_size=64), None)])
def test_pictures_are_those_of_the_source(data: DataConfig, num_batches: int | None):
    pictures = PictureData(data, 32)
    first = next(iter(pictures.train_dataloader()))
    assert first.image.shape == (data.batch_size, 3, 32, 32)
    assert 0 <= first.image.min() < first.image.max() <= 1
    assert num_batches in (None, len(pictures.train_dataloader()))


def test_a_decoder_that_learns_alone_keeps_every_code(tmp_path):
    start = fitted(TokenizerRecipe(**SIZES), str(tmp_path / "start")).tokenizer
    start.save(tmp_path / "start")
    recipe = TokenizerRecipe(**SIZES, start=str(tmp_path / "start"))
    before = TokenizerModule(recipe).tokenizer
    after = fitted(recipe, str(tmp_path / "end")).tokenizer
    images = next(iter(PictureData(SCENES, 64).val_dataloader())).image
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.allclose(before.decode(before.encode(images)), after.decode(before.encode(images)))
