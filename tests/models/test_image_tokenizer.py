"""Pixels to codes and back: shapes, ranges, errors, folders."""

import pytest
import torch

from sjd2_lightning.models.image_tokenizer import VQImageTokenizer, load_image_tokenizer, to_uint8
from tests.tools.tiny_backbones import tiny_image_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return tiny_image_tokenizer(num_codes=9, patch=4)


def test_codes_and_pixels_have_their_shapes_and_ranges(tokenizer):
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 2, 3)
    assert ids.dtype == torch.long
    assert 0 <= ids.min() <= ids.max() < tokenizer.num_codes == 9
    pixels = tokenizer.decode(ids)
    assert pixels.shape == images.shape
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert not pixels.requires_grad
    assert tokenizer.downsample == 4


def test_codes_are_the_nearest_rows_of_the_codebook(tokenizer):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = tokenizer.vq.quant_conv(tokenizer.vq.encoder(torch.pixel_unshuffle(images * 2 - 1, 4)))
    rows = tokenizer.vq.quantize.embedding.weight
    nearest = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 4), rows).argmin(1)
    assert torch.equal(tokenizer.encode(images).flatten(), nearest)


def test_patches_keep_their_place(tokenizer):
    """A code decides its own corner of the image more than the far one."""
    base, other = torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long)
    other[0, 0, 0] = 5
    change = (tokenizer.decode(base) - tokenizer.decode(other)).abs()[0].sum(0)
    assert change[:8, :8].max() > 2 * change[12:, 12:].max()


@pytest.mark.parametrize("wrong", [-1, 9])
def test_codes_outside_the_codebook_are_named(tokenizer, wrong):
    ids = torch.zeros(1, 2, 2, dtype=torch.long)
    ids[0, 1, 1] = wrong
    with pytest.raises(ValueError, match=rf"\[0, 9\).*{wrong}"):
        tokenizer.decode(ids)


def test_round_trip_through_a_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_image_tokenizer(tmp_path)
    ids = torch.randint(9, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(again.decode(ids), tokenizer.decode(ids), atol=2e-2)  # half precision on disk
    again.save(tmp_path / "second")
    second = load_image_tokenizer(tmp_path / "second")
    assert second.identity == again.identity
    assert torch.equal(second.decode(ids), again.decode(ids))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training


def test_identity_is_of_the_weights(tokenizer):
    before = tokenizer.identity
    weight = tokenizer.vq.quantize.embedding.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    changed = tokenizer.identity
    with torch.no_grad():
        weight[0, 0] -= 1e-3
    assert changed != before
    assert len(before) == 64


def test_isolated_patches_have_codes_of_their_own_pixels_alone(tokenizer, tmp_path):
    """The same patch has the same code in any picture; without isolation the rest of the picture matters."""
    alone = VQImageTokenizer(tokenizer.vq, isolate_patches=True)
    side = alone.downsample
    pictures = torch.rand(8, 3, 3 * side, 2 * side, generator=torch.Generator().manual_seed(2))
    pictures[:, :, side : 2 * side, :side] = pictures[:1, :, side : 2 * side, :side]
    latents = alone.latents(pictures)
    assert torch.allclose(latents[:, :, 1, 0], latents[:1, :, 1, 0].expand(8, -1), atol=1e-5)
    for row in range(3):
        for column in range(2):
            patch = pictures[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert torch.allclose(latents[..., row, column], tokenizer.latents(patch)[..., 0, 0], atol=1e-5)
    whole = tokenizer.latents(pictures)
    assert not torch.allclose(whole[:, :, 1, 0], whole[:1, :, 1, 0].expand(8, -1), atol=1e-3)
    assert alone.identity != tokenizer.identity, "shards of the one are none of the other"
    alone.save(tmp_path)
    assert load_image_tokenizer(tmp_path).isolate_patches


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no image tokenizer in {tmp_path}.*experiment=tiny_tokenizer"):
        load_image_tokenizer(tmp_path)


def test_bytes_of_images():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert to_uint8(images).shape == (1, 2, 2, 3)
    assert to_uint8(images)[0, 0, 0].tolist() == [0, 128, 255]
    assert to_uint8(images + 1e-4)[0, 0, 0].tolist() == [0, 128, 255]
    for wrong in (1.5, -0.5):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            to_uint8(torch.full((1, 3, 2, 2), wrong))
    for wrong in (torch.nan, torch.inf):
        pictures = images.repeat(3, 1, 1, 1)
        pictures[1, 2, 0, 1] = wrong
        with pytest.raises(ValueError, match="pixels of image 2 of 3 are not finite"):
            to_uint8(pictures)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_have_no_identity(value):
    """And so make no shards: every picture would get one code."""
    hurt = tiny_image_tokenizer(num_codes=9, patch=4)
    with torch.no_grad():
        hurt.vq.encoder.conv_in.bias[1] = value
    with pytest.raises(ValueError, match=r"image tokenizer: the weight encoder\.conv_in\.bias holds NaN"):
        _ = hurt.identity
