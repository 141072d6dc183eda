"""The window's state: spans, the strip that moves rarely, and its size."""

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.randomness import Purpose, gumbel, normal, slot_keys, stream, uniform
from sjd2_lightning.decoding.rules import Scores, Verdict
from sjd2_lightning.decoding.strip import Span
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import rows_with_newlines

COLUMNS = torch.arange(40)


def _window(acceptance: str, num_codes: int = 5, rows: int = 3, window: int = 6, side: int = 16) -> Window:
    config = DecodingConfig("sjd2", window, 2, acceptance)
    table = torch.randn(num_codes + 1, 4, generator=torch.Generator().manual_seed(0))
    method = Method(config, [rows_with_newlines(side, side, num_codes, (side, side))], table, num_codes)
    return method.window(100 + torch.arange(rows))


@pytest.mark.parametrize("starts", [[4, 4, 4], [4, 0, 9]])
def test_spans_read_and_write_what_an_index_would(starts):
    buffer = torch.arange(3 * 20 * 2.0).view(3, 20, 2)
    span = Span(starts, torch.tensor(starts), 5, COLUMNS)
    assert span.is_slice is (len(set(starts)) == 1)
    wanted = torch.stack([row[start : start + 5] for row, start in zip(buffer, starts, strict=True)])
    assert torch.equal(span.read(buffer), wanted)
    assert span.index.tolist() == [list(range(start, start + 5)) for start in starts]
    changed = buffer.clone()
    span.write(changed, -wanted)
    assert torch.equal(span.read(changed), -wanted)
    assert (changed != buffer).sum() == (wanted != 0).sum()


def test_left_of_a_buffer_its_first_column_is_read():
    buffer = torch.arange(2 * 6).view(2, 6)
    for starts in ([-2, -2], [-2, 1]):
        span = Span(starts, torch.tensor(starts), 4, COLUMNS)
        assert span.read(buffer)[0].tolist() == [0, 0, 0, 1]
        assert span.index[0].tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize("acceptance", ["replay", "exact"])
@pytest.mark.parametrize("together", [True, False], ids=["in step", "ragged"])
def test_numbers_belong_to_slot_and_iteration_wherever_the_strip_lies(acceptance, together):
    window = _window(acceptance)
    steps = torch.randint(1, 7, (30, 3), generator=torch.Generator().manual_seed(1))
    moves = 0
    for iteration, num in enumerate(steps.tolist()):
        if together:
            num = num[:1] * 3
        slots = window.slots()
        keys = slot_keys(window.seeds[:, None], window.head[:, None] + COLUMNS[:6])
        if acceptance == "replay":
            assert torch.equal(slots.gumbel, gumbel(stream(keys, Purpose.GUMBEL), 5))
        else:
            assert torch.equal(slots.uniforms, uniform(stream(keys, Purpose.VERDICT, iteration), 3))
        noise = normal(stream(keys, Purpose.NOISE), 4)
        untouched = slots.levels == 2  # and neither structural nor fed before
        assert torch.equal(slots.noisy[untouched], noise[untouched])
        law, scores = torch.full((3, 6, 5), float(iteration)), Scores(torch.zeros(3, 6, 5))
        before = window.strip.base.clone()
        window.renew(slots, slots.tokens, Verdict(slots.tokens, slots.is_code, slots.tokens, law), scores)
        window.advance(num, torch.tensor(num))
        moves += int((window.strip.base != before).any())
        if acceptance == "exact":  # what stayed in the window keeps its law, what entered is flat
            for row in range(3):
                kept = window.slots().draft_probs[row, : 6 - num[row]]
                assert (kept == iteration).all()
                assert torch.allclose(window.slots().draft_probs[row, 6 - num[row] :], torch.tensor(0.2))
    assert 3 < moves < 15, "the strip moves now and then, not in every iteration"


@pytest.mark.parametrize("acceptance", ["replay", "exact"])
def test_state_is_one_window_of_laws(acceptance):
    """One field is as wide as the vocabulary, of the window and 4 slots ahead; all else is small."""
    rows, length, num_codes = 4, 32, 8192
    window = _window(acceptance, num_codes, rows, length)
    wide = 4 * rows * length * num_codes
    assert wide < window.num_bytes < 1.2 * wide
    window.advance([32, 1, 7, 30], torch.tensor([32, 1, 7, 30]))
    assert window.num_bytes < 1.2 * wide
