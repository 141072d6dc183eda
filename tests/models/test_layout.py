"""Layouts of several sizes against rows written out, and ids there and back."""

import pytest
import torch

from sjd2_lightning.models.backbone import right_aligned, rows_with_newlines


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 1), (2, 2), (3, 2), (16, 16), (48, 48)])
def test_rows_end_in_newlines_but_the_last(height, width):
    layout = rows_with_newlines(height, width, newline=99, pixels=(8 * height, 8 * width))
    wanted: list[int] = []
    for row in range(height):
        wanted += [-1] * width
        if row < height - 1:
            wanted.append(99)
    assert layout.forced == tuple(wanted)
    assert layout.num_slots == height * (width + 1) - 1
    assert layout.code_slots.tolist() == [slot for slot, forced in enumerate(wanted) if forced < 0]


def test_ids_there_and_back():
    layout = rows_with_newlines(3, 2, newline=9, pixels=(6, 4))
    image_ids = torch.tensor([[[0, 1], [2, 3], [4, 5]], [[8, 7], [6, 5], [4, 3]]])
    slot_ids = layout.slot_ids(image_ids)
    assert slot_ids.tolist() == [[0, 1, 9, 2, 3, 9, 4, 5], [8, 7, 9, 6, 5, 9, 4, 3]]
    assert torch.equal(layout.image_ids(slot_ids), image_ids)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 6, 1), (1, 3, 3)])
def test_codes_of_another_size_are_refused(shape):
    layout = rows_with_newlines(3, 2, newline=9, pixels=(6, 4))
    with pytest.raises(ValueError, match="do not fit 3x2"):
        layout.slot_ids(torch.zeros(shape, dtype=torch.long))


def test_ragged_rows_align_at_their_right_ends():
    ids, starts = right_aligned([[5], [1, 2, 3], [7, 8]])
    assert ids.tolist() == [[0, 0, 5], [1, 2, 3], [0, 7, 8]]
    assert starts.tolist() == [2, 0, 1]
    ids, starts = right_aligned([[5]], pad_to=4)
    assert ids.tolist() == [[0, 0, 0, 5]]
    assert starts.tolist() == [3]
