"""Real images and their altered copies."""

import numpy as np
import pytest
import torch
from PIL import Image

from sjd2_lightning.evaluation.references import blurred, held_out_emoji, image_folder, patch_shuffled


def test_held_out_pictures_are_the_split():
    reference = held_out_emoji(16)
    assert reference.images.shape == (len(reference.keys), 16, 16, 3)
    assert reference.images.dtype == torch.uint8
    assert reference.identity == held_out_emoji(16).identity != held_out_emoji(17).identity


def test_blur_and_shuffle_keep_what_they_should():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert (blurred(images).float().mean() - images.float().mean()).abs() < 2
    assert blurred(images).float().std() < 0.5 * images.float().std()
    shuffled = patch_shuffled(images)
    assert torch.equal(shuffled.flatten().sort().values, images.flatten().sort().values)
    assert not torch.equal(shuffled, images)
    assert torch.equal(shuffled, patch_shuffled(images))
    patches = {image[:8, :8].numpy().tobytes() for image in shuffled}
    originals = {
        image[y : y + 8, x : x + 8].numpy().tobytes()
        for image in images
        for y in (0, 8, 16, 24)
        for x in (0, 8, 16, 24)
    }
    assert patches <= originals


def test_image_folder_crops_the_middle(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a bar\n")
    reference = image_folder(tmp_path, (10, 10))
    assert (reference.keys, reference.captions) == (("a", "b"), ("a bar", ""))
    assert (reference.images == 200).all()


def test_bad_folders_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        image_folder(tmp_path / "absent", (8, 8))
    with pytest.raises(ValueError, match="holds 0 images"):
        image_folder(tmp_path, (8, 8))
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        image_folder(tmp_path, (8, 8))
