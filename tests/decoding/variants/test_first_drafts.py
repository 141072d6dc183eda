"""Neighbours of a slot, and what a slot repeats of them when it enters the window."""

import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.rules import Scores, Verdict
from sjd2_lightning.decoding.variants.first_drafts import neighbours, repeated
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import rows_with_newlines
from sjd2_lightning.noise import NoiseProcess

# slots 0 1 2 | end 3, 4 5 6 | end 7
LAYOUT = rows_with_newlines(2, 3, 5, (2, 3))


def window_of(**kwargs):
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    method = Method(DecodingConfig("sjd2", 4, **kwargs), table, 5)
    return method, method.begin(torch.tensor([1, 2]), [LAYOUT] * 2, LAYOUT.num_slots + 4)


def moved_on(method, state, committed):
    """The window behind `committed` (B,) slots, entered; and its slots."""
    window = Window(method.source, state)
    verdict = Verdict(window.slots().tokens, window.slots().is_code, window.slots().tokens)
    scores = Scores(torch.zeros(2, 4, 5))
    window.advance(committed, committed, verdict, scores)
    for event in method.on_entry:
        event.entered(window, committed, scores)
    return Window(method.source, state).slots()


def test_neighbours_skip_the_ends_of_rows():
    assert neighbours(LAYOUT, "repeat_left", 10).tolist() == [-1, 0, 1, 2, 2, 4, 5, 6, 6, 6]
    assert neighbours(LAYOUT, "repeat_above", 10).tolist() == [-1, -1, -1, -1, 0, 1, 2, -1, -1, -1]


def test_a_draft_that_does_not_exist_yet_is_not_repeated():
    method, state = window_of(num_levels=0, acceptance="exact")
    state.tokens.copy_(torch.arange(10, 21))
    state.head.add_(3)
    window = Window(method.source, state)  # slots 3, 4, 5, 6
    for kind, wanted in (("repeat_left", [14, 14]), ("repeat_above", [11, 12])):
        neighbour = neighbours(LAYOUT, kind, 11).expand(2, -1)
        # two slots have entered: 5 and 6; slot 6 has no left neighbour yet and repeats what slot 5 does
        found, known = repeated(window, torch.tensor([2, 2]), neighbour, kind)
        assert found[:, 2:].tolist() == [wanted] * 2
        assert known.tolist() == [[False, False, True, True]] * 2
    found, known = repeated(window, torch.tensor([4, 5]), neighbour, "repeat_above")
    assert known.tolist() == [[False, True, True, True], [False, True, True, False]], "no draft there"


def test_slots_that_enter_repeat_and_are_certain_of_it():
    method, state = window_of(num_levels=0, acceptance="exact", draft_init="repeat_left")
    state.tokens[:, :4] = torch.tensor([[1, 2, 3, 5], [4, 0, 2, 5]])
    slots = moved_on(method, state, torch.tensor([2, 1]))
    # row 0 now ends at slot 5, row 1 at slot 4; all that entered repeat slot 2, the last draft
    assert slots.tokens[0].tolist() == [3, 5, 3, 3]
    assert slots.tokens[1].tolist() == [0, 2, 5, 2]
    assert slots.draft_probs[0, 2].tolist() == [0, 0, 0, 1, 0]
    assert torch.allclose(slots.draft_probs[0, 0], torch.tensor(0.2)), "what was there before stays"
    assert torch.allclose(slots.draft_probs[1, 2], torch.tensor(0.2)), "of structural slots too"


def test_slots_may_start_at_their_own_maximum():
    method, state = window_of(num_levels=0, draft_init="gumbel")
    slots = Window(method.source, state).slots()
    best = slots.gumbel.argmax(-1)
    assert torch.equal(slots.tokens[slots.is_code], best[slots.is_code])


def test_slots_may_start_from_the_code_one_row_up():
    method, state = window_of(num_levels=2, noise=NoiseProcess(source="above"))
    state.tokens[:, :4] = torch.tensor([[1, 2, 3, 5], [4, 0, 2, 5]])
    noisy = moved_on(method, state, torch.tensor([2, 2])).noisy
    rows = method.levels.normalised
    assert torch.equal(noisy[:, 2:], rows[torch.tensor([[1, 2], [4, 0]])])
    assert not noisy[:, :2].any(), "the first row has none: it starts from the mean"
