"""What decoding holds: one field as wide as the vocabulary at most, and a few more at its peak."""

import pytest
import torch

from benchmarks.memory import LiveBytes
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode, start
from sjd2_lightning.decoding.method import Method
from tests.tools.tiny_backbones import tiny_chameleon

GUIDED = Sampling(guidance_scale=3.0)
NUM_CODES = 4096


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(num_codes=NUM_CODES, num_layers=1, hidden_size=8)


def bytes_of(backbone, acceptance: str, rows: int, window: int) -> tuple[int, int]:
    """Bytes of the state, and of all that decoding makes at its peak, cache and trunk included."""
    config = DecodingConfig("sjd2", window, 1, acceptance, sampling=GUIDED)
    layout = backbone.layout(4, 4)
    method = Method(config, backbone.slot_table(), NUM_CODES)
    state = method.begin(torch.arange(rows), [layout] * rows, layout.num_slots + window)
    with LiveBytes() as live:
        decode(backbone, ["red cat"] * rows, range(rows), config, layout)
    return state.num_bytes, live.peak


@pytest.mark.parametrize("acceptance", ["replay", "exact"])
def test_state_and_peak_grow_as_batch_times_window_times_vocabulary(backbone, acceptance, monkeypatch):
    monkeypatch.setattr(start, "MOST_KEPT", 0)  # as for large vocabularies: numbers are drawn in each pass
    held = 1 if acceptance == "exact" else 0  # laws that drafts were drawn from
    for rows, window in [(1, 32), (4, 32), (4, 64)]:
        law = 4 * rows * window * NUM_CODES  # one number for each row, slot and code
        state, peak = bytes_of(backbone, acceptance, rows, window)
        assert held * law <= state < (held + 0.05) * law, "one field of the window in single precision"
        assert state < peak < 14 * law, "9.6 without the type checks of tests, which hold arguments longer"
