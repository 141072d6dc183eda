"""Neighbours of a slot, and what a slot repeats of them when it enters the window."""

import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.variants.first_drafts import neighbours, repeated
from sjd2_lightning.models.backbone import rows_with_newlines
from sjd2_lightning.noise import NoiseProcess

# slots 0 1 2 | end 3, 4 5 6 | end 7
LAYOUT = rows_with_newlines(2, 3, 5, (2, 3))


def window_of(**kwargs):
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return Method(DecodingConfig("sjd2", 4, **kwargs), [LAYOUT], table, 5).window(torch.tensor([1, 2]))


def test_neighbours_skip_the_ends_of_rows():
    assert neighbours(LAYOUT, "repeat_left", 10).tolist() == [-1, 0, 1, 2, 2, 4, 5, 6, 6, 6]
    assert neighbours(LAYOUT, "repeat_above", 10).tolist() == [-1, -1, -1, -1, 0, 1, 2, -1, -1, -1]


def test_a_draft_that_does_not_exist_yet_is_not_repeated():
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    slots, ends = torch.tensor([[4, 5, 6]]), torch.tensor([[5]])
    for kind, wanted in (("repeat_left", [12, 14, 14]), ("repeat_above", [10, 11, 12])):
        neighbour = neighbours(LAYOUT, kind, 8)[None]
        found, known = repeated(tokens, slots, ends, neighbour, kind)
        assert found.tolist() == [wanted]
        assert known.all()
    found, known = repeated(
        tokens, slots, torch.tensor([[1]]), neighbours(LAYOUT, "repeat_above", 8)[None], "repeat_above"
    )
    assert known.tolist() == [[True, False, False]], "slots 1 and 2 have no draft"


def test_slots_that_enter_repeat_and_are_certain_of_it():
    window = window_of(num_levels=0, acceptance="exact", draft_init="repeat_left")
    window.tokens[:, :4] = torch.tensor([[1, 2, 3, 5], [4, 0, 2, 5]])
    window.advance([2, 1], torch.tensor([2, 1]))
    slots = window.slots()
    # row 0 now ends at slot 5, row 1 at slot 4; all that entered repeat slot 2, the last draft
    assert slots.tokens[0].tolist() == [3, 5, 3, 3]
    assert slots.tokens[1].tolist() == [0, 2, 5, 2]
    assert slots.draft_probs[0, 2].tolist() == [0, 0, 0, 1, 0]
    assert torch.allclose(slots.draft_probs[0, 0], torch.tensor(0.2)), "what was there before stays"


def test_slots_may_start_at_their_own_maximum():
    window = window_of(num_levels=0, draft_init="gumbel")
    slots = window.slots()
    best = slots.gumbel.argmax(-1)
    assert torch.equal(slots.tokens[slots.is_code], best[slots.is_code])


def test_slots_may_start_from_the_code_one_row_up():
    window = window_of(num_levels=2, noise=NoiseProcess(source="above"))
    window.tokens[:, :4] = torch.tensor([[1, 2, 3, 5], [4, 0, 2, 5]])
    window.advance([2, 2], torch.tensor([2, 2]))
    noisy = window.slots().noisy
    rows = window.source.levels.normalised
    assert torch.equal(noisy[:, 2:], rows[torch.tensor([[1, 2], [4, 0]])])
    assert not noisy[:, :2].any(), "the first row has none: it starts from the mean"
