"""The cached, windowed forward of a real trunk equals the full one, rejected drafts and all."""

import pickle

import pytest
import torch

from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.backbone import right_aligned, rows_with_newlines
from sjd2_lightning.models.kv_cache import KVCache
from tests.tools.tiny_backbones import strong_table, tiny_chameleon


def _forward(backbone, ids, columns, first, cache=None, num_visible=None):
    """Hidden states of ids (B, L) in columns (B, L) of rows that start in columns `first`."""
    levels = torch.zeros_like(columns)
    if cache is not None:
        cache.place(columns, num_visible)
    mask = attention_mask(columns, levels, first, num_visible or columns.shape[1])
    positions = (columns - first[:, None]).clamp_min(0)
    return backbone(backbone.embed_tokens(ids), positions, mask, cache)


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(5, num_layers=3).requires_grad_(False)


def test_windows_of_any_size_equal_the_full_forward(backbone):
    """Rows move at their own pace; the end of each window is wrong, as rejected drafts are, and fed again."""
    rng = torch.Generator().manual_seed(0)
    length, window, batch = 24, 5, 6
    vocabulary = backbone.model.config.vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=rng)
    first = torch.tensor([0, 3, 1, 0, 5, 2])
    columns = torch.arange(length).expand(batch, -1)
    full = _forward(backbone, ids, columns, first)
    cache = backbone.new_cache(batch, length + window)
    start = 6
    _forward(backbone, ids[:, :start], columns[:, :start], first, cache, start)
    heads = torch.full((batch,), start)
    span = torch.arange(window)
    padded = torch.cat([ids, ids[:, :window]], dim=1)
    while heads.min() < length:
        fed_columns = heads.clamp_max(length)[:, None] + span
        fed = padded.gather(1, fed_columns)
        num_right = torch.randint(1, window + 1, (batch,), generator=rng)
        fed = fed.where(span < num_right[:, None], (fed + 1) % vocabulary)
        num_visible = int(fed_columns.max()) + 1
        hidden = _forward(backbone, fed, fed_columns, first, cache, num_visible)
        for row in range(batch):
            for place in range(int(num_right[row])):
                column = int(heads[row]) + place
                if column < length:
                    assert torch.allclose(hidden[row, place], full[row, column], atol=1e-5)
        heads = (heads + num_right).clamp_max(length)


def test_padding_changes_nothing(backbone):
    ids = torch.tensor([[3, 7, 1, 9]])
    columns = torch.arange(4)[None]
    alone = _forward(backbone, ids, columns, torch.tensor([0]))
    for junk in (0, 5):
        padded = torch.cat([torch.full((1, 3), junk), ids], dim=1)
        hidden = _forward(backbone, padded, torch.arange(7)[None], torch.tensor([3]))
        assert torch.allclose(hidden[:, 3:], alone, atol=1e-5)
        assert torch.isfinite(hidden).all()


def _cache(batch=2, max_len=6):
    return KVCache(1, batch, 1, max_len, 2, dtype=torch.float32, device=torch.device("cpu"))


def test_entries_lie_where_each_row_says():
    cache = _cache()
    entries = torch.arange(8.0).view(2, 1, 2, 2)
    cache.place(torch.tensor([[0, 1], [3, 4]]), num_visible=5)
    keys, values = cache.update(entries, 10 * entries, 0)
    assert keys.shape == values.shape == (2, 1, 5, 2)
    assert keys[0, 0].tolist() == [[0, 1], [2, 3], [0, 0], [0, 0], [0, 0]]
    assert values[1, 0].tolist() == [[0, 0], [0, 0], [0, 0], [40, 50], [60, 70]]
    cache.place(torch.tensor([[1], [4]]))
    keys, _ = cache.update(-torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 1, 2), 0)
    assert keys.shape[2] == 6
    assert keys[0, 0, :2].tolist() == [[0, 1], [-1, -1]]


def test_rows_leave():
    cache = _cache(batch=3)
    cache.place(torch.tensor([[0], [0], [0]]))
    entries = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 1, 2)
    cache.update(entries, torch.zeros(3, 1, 1, 2), 0)
    cache.keep_rows(torch.tensor([0, 2]))
    cache.place(torch.tensor([[1], [1]]))
    keys, _ = cache.update(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2), 0)
    assert keys[:, 0, 0, 0].tolist() == [1, 3]
    assert cache.num_bytes == 2 * 2 * 6 * 2 * 4
    address = keys.data_ptr()
    whole = cache.all_rows().keys[0]
    assert (len(whole), whole.data_ptr()) == (3, address), "rows leave in the same memory, and come back"


def test_too_short_a_cache_is_named():
    with pytest.raises(ValueError, match="7 positions needed, 6 allocated"):
        _cache().place(torch.zeros(2, 1, dtype=torch.long), num_visible=7)


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


def test_prompt_and_image_share_the_positions():
    backbone = tiny_chameleon(7)
    layout = backbone.layout(6, 4)  # 8 slots
    assert backbone.num_positions == 256
    assert not backbone.excess(range(248), layout)
    assert "249 tokens with its template, and the model has 256 positions, 8 of them" in backbone.excess(
        range(249), layout
    )
    assert not strong_table(3).excess(range(10**6), layout), "a model without a limit"


def test_ids_need_no_weights():
    backbone = tiny_chameleon(7)
    light, layout = backbone.without_weights(), backbone.layout(6, 4)
    assert not list(light.state_dict())
    assert light.prompt_ids("red cat", layout) == backbone.prompt_ids("red cat", layout)
    assert light.num_positions == backbone.num_positions
    again = pickle.dumps(light)
    assert len(again) < len(pickle.dumps(backbone))
    assert pickle.loads(again).prompt_ids("red cat", layout) == backbone.prompt_ids("red cat", layout)
    assert list(backbone.state_dict()), "the model itself keeps them"
