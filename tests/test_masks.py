"""The one attention mask against a sentence for each pair of columns."""

import torch

from sjd2_lightning.masks import Visible, additive, attention_mask


def sees(query: int, key: int, level: int, first: int, num_side: int) -> bool:
    """Side tokens and padding see themselves; others their row so far, and the side token of their level."""
    if query < first:
        return key == query
    if key < num_side:
        return level > 0 and key == level - 1
    return first <= key <= query


def test_mask_is_its_enumeration():
    rng = torch.Generator().manual_seed(0)
    for num_side in (0, 1, 4):
        first = num_side + torch.tensor([0, 2, 5])
        start = num_side + 5
        for offset in (0, 3):  # all columns, then a window in the middle
            columns = torch.arange(start + 8).expand(3, -1)
            levels = torch.randint(num_side + 1, (3, start + 8), generator=rng)
            levels[:, :start] = 0
            columns, levels = (part[:, offset * 3 :] for part in (columns, levels))
            mask = attention_mask(columns, levels, first, start + 10)
            assert mask.shape == (3, 1, columns.shape[1], start + 10)
            assert mask.dtype == torch.bool
            for row in range(3):
                for place in range(columns.shape[1]):
                    query, level = int(columns[row, place]), int(levels[row, place])
                    wanted = [sees(query, key, level, int(first[row]), num_side) for key in range(start + 10)]
                    assert mask[row, 0, place].tolist() == wanted


def test_no_query_is_blind():
    columns = torch.arange(12).expand(2, -1)
    mask = attention_mask(columns, torch.zeros_like(columns), torch.tensor([3, 9]), 12)
    assert mask.any(-1).all()


def test_additive_mask_hides_the_same_columns():
    mask = torch.tensor([[True, False], [False, True]])
    for dtype in (torch.float32, torch.bfloat16):
        assert additive(mask, dtype).dtype == dtype
        assert additive(mask, dtype).tolist() == [[0, -torch.inf], [-torch.inf, 0]]


def test_visible_is_its_enumeration():
    rng = torch.Generator().manual_seed(0)
    first = torch.tensor([2, 4])
    before, own_from, column = (torch.randint(12, (2, 9), generator=rng) for _ in range(3))
    side = torch.randint(-1, 2, (2, 9), generator=rng)
    dense = Visible(first, before, own_from, column, side).dense(12)
    assert dense.shape == (2, 1, 9, 12)
    for row in range(2):
        for place in range(9):
            low, high, own, end, alone = (
                int(bound)
                for bound in (first[row], *(b[row, place] for b in (before, own_from, column, side)))
            )
            wanted = [low <= key < high or own <= key <= end or key == alone for key in range(12)]
            assert dense[row, 0, place].tolist() == wanted


def test_what_is_left_out_is_filled_in():
    first, column = (
        torch.tensor([2, 4]),
        torch.randint(5, 12, (2, 9), generator=torch.Generator().manual_seed(0)),
    )
    visible = Visible(first, column + 1, None, column, None)
    assert torch.equal(visible.filled().dense(12), visible.dense(12))
    assert all(field.is_contiguous() for field in visible.filled())
