"""The window's state: what belongs to a slot stays with it, whichever rows are left."""

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, start
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.randomness import Purpose, gumbel, normal, slot_keys, stream, uniform
from sjd2_lightning.decoding.rules import Scores, Verdict
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import rows_with_newlines

WINDOW = torch.arange(6)


def begun(acceptance: str):
    """A method, and its state of three rows."""
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    method = Method(DecodingConfig("sjd2", 6, 2, acceptance), table, 5)
    layouts = [rows_with_newlines(16, 16, 5, (16, 16))] * 3
    return method, method.begin(100 + torch.arange(3), layouts, layouts[0].num_slots + 6)


@pytest.mark.parametrize("most_kept", [start.MOST_KEPT, 0], ids=["kept", "drawn in each pass"])
@pytest.mark.parametrize("acceptance", ["replay", "exact"])
def test_numbers_belong_to_slot_and_iteration(acceptance, most_kept, monkeypatch):
    monkeypatch.setattr(start, "MOST_KEPT", most_kept)
    method, state = begun(acceptance)
    assert (state.gumbel is not None) == (acceptance == "replay" and most_kept > 0)
    steps = torch.randint(1, 7, (30, 3), generator=torch.Generator().manual_seed(1))
    for iteration, committed in enumerate(steps):
        window = Window(method.source, state)
        slots = window.slots()
        keys = slot_keys(state.seeds[:, None], state.head[:, None] + WINDOW)
        if acceptance == "replay":
            assert torch.equal(slots.gumbel, gumbel(stream(keys, Purpose.GUMBEL), 5))
        else:
            assert torch.equal(slots.uniforms, uniform(stream(keys, Purpose.VERDICT, iteration), 3))
        noise = normal(stream(keys, Purpose.NOISE), 4)
        untouched = slots.levels == 2  # and neither structural nor fed before
        assert torch.equal(slots.noisy[untouched], noise[untouched])
        law, scores = torch.full((3, 6, 5), float(iteration)), Scores(torch.zeros(3, 6, 5))
        window.renew(slots, slots.tokens, scores)
        verdict = Verdict(slots.tokens, slots.is_code, slots.tokens, law)
        window.advance(committed, committed - 1, verdict, scores)
        assert torch.equal(window.index, state.head[:, None] + WINDOW)
        if acceptance == "exact":  # what stayed in the window keeps its law, what entered is flat
            for row, num in enumerate(committed.tolist()):
                assert (state.draft_probs[row, : 6 - num] == iteration).all()
                assert torch.allclose(state.draft_probs[row, 6 - num :], torch.tensor(0.2))
    assert torch.equal(state.committed[:, :30], steps.T)
    assert (state.uncached == 1).all()
    assert (state.iteration == 30).all()


def test_rows_leave_in_the_same_memory():
    _, state = begun("replay")
    before = {name: getattr(state, name).clone() for name in state.shapes}
    kept = state.keep(torch.tensor([0, 2]))
    for name in state.shapes:
        found = getattr(kept, name)
        assert torch.equal(found, before[name][[0, 2]])
        assert found.data_ptr() == getattr(state, name).data_ptr()
    assert kept.num_bytes * 3 == state.num_bytes * 2


def test_a_batch_takes_over_the_content_of_another():
    _, state = begun("exact")
    _, other = begun("exact")
    other.head.add_(5)
    other.draft_probs.mul_(2)
    state.fill(other)
    assert all(torch.equal(getattr(state, name), getattr(other, name)) for name in state.shapes)
    assert state.head.data_ptr() != other.head.data_ptr()
