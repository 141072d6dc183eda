"""The recipe of the image tokenizer: k-means, patches of every object, and a codebook that draws scenes."""

import pytest
import torch

from sjd2_lightning.data.sources.scenes import Variety
from sjd2_lightning.models.image_tokenizer import load_image_tokenizer
from sjd2_lightning.training.recipes import TokenizerRecipe, codebook
from sjd2_lightning.training.recipes.codebook import kmeans, make_tokenizer, object_patches

FEW = Variety(12, aligned=True)


def test_kmeans_finds_separate_groups_and_bears_fewer_vectors_than_centres():
    groups = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = 0.01 * torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    centres = kmeans(groups.repeat(30, 1) + noise, 3)
    assert torch.cdist(groups, centres).min(1).values.max() < 0.02
    assert kmeans(groups, 5).shape == (5, 2)


def test_patches_are_cut_outs_of_three_sizes():
    patches = object_patches(FEW, 8)
    assert patches.shape[1:] == (4, 8, 8)
    assert 12 * (4 + 9 + 25) < len(patches) < 12 * (16 + 36 + 81)
    assert patches[:, 3].amax((1, 2)).min() > 0
    assert (patches[:, :3] <= patches[:, 3:] + 1e-3).all(), "colours are times opacity"


def test_the_tokenizer_of_a_recipe_draws_held_out_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(codebook, "_NUM_GROUNDS", 100)
    monkeypatch.setattr(codebook, "_HELD_OUT_SCENES", 2)
    few = make_tokenizer(TokenizerRecipe(192, 64), FEW, tmp_path / "few")["val/psnr"]
    more = make_tokenizer(TokenizerRecipe(384, 64), FEW, tmp_path / "more")["val/psnr"]
    assert 25 < few < more - 2
    assert load_image_tokenizer(tmp_path / "more").num_codes == 384


def test_scenes_that_are_not_aligned_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data=scenes_small"):
        make_tokenizer(TokenizerRecipe(), Variety(12), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_sizes_that_cannot_be_are_named():
    assert "num_grounds=9" in TokenizerRecipe(9, 9).problems()[0]
