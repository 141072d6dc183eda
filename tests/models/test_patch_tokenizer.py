"""Codes that are cut-outs on a ground: round trips, grounds that are found and filled, folders, errors."""

import pytest
import torch

from sjd2_lightning.models.image_codes import PATCH_SETTINGS, has_image_tokenizer
from sjd2_lightning.models.image_tokenizer import load_image_tokenizer
from sjd2_lightning.models.patch_tokenizer import PatchTokenizer, filled, fitted_ground

SIDE, GRID = 4, 8
GROUNDS = torch.tensor([[250, 250, 250], [30, 60, 200], [200, 40, 40], [50, 70, 210]])


@pytest.fixture(scope="module")
def tokenizer() -> PatchTokenizer:
    opaque = torch.cat([GROUNDS, torch.full((4, 1), 255)], 1)[..., None, None].expand(-1, -1, SIDE, SIDE)
    generator = torch.Generator().manual_seed(0)
    opacity = torch.randint(2, (5, 1, SIDE, SIDE), generator=generator)
    opacity[:, :, 0] = 1  # something is opaque in each
    colours = torch.randint(256, (5, 3, SIDE, SIDE), generator=generator) * opacity
    return PatchTokenizer(torch.cat([opaque, torch.cat([colours, 255 * opacity], 1)]), len(GROUNDS))


def scene(ground: int, *placed: tuple[int, int, int]) -> torch.Tensor:
    """Ids (1, H, W) of a plain ground with some codes at rows and columns."""
    ids = torch.full((1, GRID, GRID), ground)
    for code, row, column in placed:
        ids[0, row, column] = code
    return ids


@pytest.mark.parametrize("ground", range(4))
def test_what_is_drawn_is_read_back_on_every_ground(tokenizer: PatchTokenizer, ground: int):
    ids = scene(ground, (4, 1, 1), (5, 1, 2), (6, 4, 5), (7, 5, 5), (8, 6, 2))
    assert torch.equal(tokenizer.encode(tokenizer.decode(ids)), ids)


def test_a_cut_out_lies_on_the_ground_around_it(tokenizer: PatchTokenizer):
    image = tokenizer.decode(scene(1, (6, 3, 4)))[0]
    patch = image[:, 3 * SIDE : 4 * SIDE, 4 * SIDE : 5 * SIDE]
    picture = tokenizer.pictures[6].float() / 255
    ground = GROUNDS[1].float()[:, None, None] / 255
    assert torch.allclose(patch, picture[:3] + (1 - picture[3]) * ground, atol=1e-5)


def test_a_graded_ground_is_found_behind_objects_of_another_colour():
    rows = torch.linspace(100, 180, GRID)[:, None].expand(GRID, GRID)
    patches = torch.stack([rows, rows / 2, 250 - rows], -1)[None, ..., None].repeat(2, 1, 1, 1, 16)
    shown = patches.clone()
    shown[0, 2:5, 3:6] = 255.0  # flat too, but no ground
    shown[1, 4:7, 0:3] = torch.rand(3, 3, 3, 16, generator=torch.Generator().manual_seed(0)) * 255
    assert (fitted_ground(shown) - patches[..., 0]).abs().max() < 3


def test_missing_colours_are_means_of_those_nearby():
    colours = torch.zeros(1, 3, 5, 6)
    colours[..., :3], colours[..., 3:] = 0.2, 0.8
    known = torch.ones(1, 5, 6, dtype=torch.bool)
    known[0, 1:4, 1:5] = False
    found = filled(colours, known)
    assert torch.equal(found[:, :, known[0]], colours[:, :, known[0]])
    assert ((found >= 0.2 - 1e-4) & (found <= 0.8 + 1e-4)).all()
    assert (found[0, 0, 2, 1] < found[0, 0, 2, 4]).all()
    assert torch.allclose(filled(colours, torch.zeros_like(known)), torch.tensor(0.5), atol=1e-3)


def test_the_same_cut_out_has_the_same_code_on_every_ground(tokenizer: PatchTokenizer):
    images = torch.cat([tokenizer.decode(scene(ground, (7, 2, 2))) for ground in range(4)])
    assert tokenizer.encode(images)[:, 2, 2].tolist() == [7] * 4


def test_round_trip_through_a_folder(tokenizer: PatchTokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert has_image_tokenizer(tmp_path)
    again = load_image_tokenizer(tmp_path)
    ids = torch.randint(9, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.decode(ids), tokenizer.decode(ids))
    assert again.identity == tokenizer.identity
    other = PatchTokenizer(tokenizer.pictures, len(GROUNDS) - 1)
    assert other.identity != tokenizer.identity, "shards of the one are none of the other"


def test_errors_name_what_is_wrong(tokenizer: PatchTokenizer, tmp_path):
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.encode(torch.zeros(1, 3, 8, 10))
    with pytest.raises(ValueError, match=r"\[0, 9\)"):
        tokenizer.decode(torch.full((1, 2, 2), 9))
    with pytest.raises(ValueError, match="must be"):
        PatchTokenizer(tokenizer.pictures[:4], 4)
    tokenizer.save(tmp_path)
    (tmp_path / PATCH_SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match="does not fit"):
        load_image_tokenizer(tmp_path)


def test_a_ground_is_smooth_between_its_colours(tokenizer: PatchTokenizer):
    ids = scene(1)
    ids[0, :, GRID // 2 :] = 3
    row = tokenizer.decode(ids)[0, 0, 0] * 255
    whole = GROUNDS[3, 0] - GROUNDS[1, 0]
    steps = row.diff()
    assert (steps >= -1e-3).all()
    assert 0 < steps.max() < whole / 2, "no edge where two patches meet"
