"""Random numbers: uniform, independent between neighbours, and functions of their key alone."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sjd2_lightning.decoding import randomness
from sjd2_lightning.decoding.randomness import Purpose, gumbel, integers, normal, slot_keys, stream, uniform

COUNT = 60_000
P_PASS = 1e-6  # under 60 tests of fixed keys: a good generator with other keys would fail one with p < 1e-4


def numbers(seeds=0, slots=0, purpose=Purpose.GUMBEL, draw=0, count=1):
    """Uniform numbers of streams; integers are broadcast against ranges."""
    seeds, slots = torch.as_tensor(seeds), torch.as_tensor(slots)
    return uniform(stream(slot_keys(seeds, slots), purpose, draw), count)


def families() -> dict[str, np.ndarray]:
    """Long sequences of numbers that differ in one part of the key only."""
    many = torch.arange(COUNT)
    draws = [numbers(0, torch.arange(60), draw=draw, count=10) for draw in range(100)]
    purposes = [numbers(torch.arange(COUNT // 8), 3, purpose) for purpose in Purpose]
    return {
        "seeds": numbers(many, 5)[:, 0].numpy(),
        "negative and large seeds": numbers((many - COUNT // 2) * 2**40, 5)[:, 0].numpy(),
        "slots": numbers(7, many)[:, 0].numpy(),
        "within one stream": numbers(7, 3, count=COUNT).numpy(),
        "draws": torch.stack(draws, -1).flatten().numpy(),
        "purposes": torch.stack(purposes, -1).flatten().numpy(),
    }


@pytest.mark.parametrize("family", families())
def test_uniform(family):
    values = families()[family]
    assert 0 < values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > P_PASS
    cells = np.bincount((values * 256).astype(int), minlength=256)
    assert stats.chisquare(cells).pvalue > P_PASS
    low_bits = np.bincount((values.astype(np.float64) * 2**23).astype(int) % 64, minlength=64)
    assert stats.chisquare(low_bits).pvalue > P_PASS


@pytest.mark.parametrize("lag", [1, 2, 8])
@pytest.mark.parametrize("family", families())
def test_neighbours_are_independent(family, lag):
    """Correlation, and a chi-square test of 16 x 16 cells of pairs."""
    values = families()[family]
    first, second = values[:-lag], values[lag:]
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(first))
    cells = np.bincount((first * 16).astype(int) * 16 + (second * 16).astype(int), minlength=256)
    assert stats.chisquare(cells).pvalue > P_PASS


def test_streams_do_not_overlap():
    """No number of one stream turns up in a neighbouring one, at any shift: a shared counter would show."""
    keys = stream(slot_keys(torch.arange(20)[:, None], torch.arange(20)), Purpose.GUMBEL)
    streams = [keys, stream(slot_keys(torch.arange(20)[:, None], torch.arange(20)), Purpose.NOISE)]
    streams.append(stream(slot_keys(torch.arange(20)[:, None], torch.arange(20)), Purpose.GUMBEL, 1))
    triples = torch.cat([uniform(key.flatten(), 200).unfold(1, 3, 1).flatten(0, 1) for key in streams])
    assert len(triples.unique(dim=0)) == len(triples)


def test_no_number_is_zero_or_one():
    """The ends of the range, which draws rarely meet: an infinite Gumbel number is a forced token."""
    ends = torch.tensor([0, 2**23 - 1])

    def both_ends(key, count):
        return ends.expand(*key.shape, 2)

    largest = int(randomness._bits(torch.arange(100_000), 8).max())
    assert 2**23 - 200 < largest < 2**23
    real = randomness._bits
    try:
        randomness._bits = both_ends
        key = torch.zeros(1, dtype=torch.long)
        assert 0 < uniform(key, 2).min() < uniform(key, 2).max() < 1
        assert torch.isfinite(gumbel(key, 2)).all()
        assert torch.isfinite(normal(key, 2)).all()
    finally:
        randomness._bits = real


def test_numbers_belong_to_their_key():
    """Whatever the batch, the order and the count."""
    together = numbers(torch.arange(4)[:, None], torch.arange(9), count=6)
    assert together.shape == (4, 9, 6)
    for seed in range(4):
        for slot in (8, 0, 3):
            assert torch.equal(together[seed, slot], numbers(seed, slot, count=6))
    assert torch.equal(numbers(3, 2, count=20)[:6], together[3, 2])
    different = [numbers(3, 2), numbers(2, 3), numbers(3, 2, draw=1), numbers(3, 2, Purpose.NOISE)]
    assert len({float(value) for value in different}) == 4


def test_known_values():
    """SplitMix64 of seed 1234567, from its reference implementation; and one key written out in Python."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix(1234567 + i * golden & mask) for i in (1, 2, 3)] == published
    assert randomness._bits(torch.tensor(1234567), 3).tolist() == [value >> 41 for value in published]
    slot_key = mix(mix(5 + golden & mask) + 10 * golden & mask)
    key = mix(slot_key + ((int(Purpose.VERDICT) << 32) + 7 + 1) * golden & mask)
    wanted = (mix(key + golden & mask) >> 41) + 0.5
    assert float(numbers(5, 9, Purpose.VERDICT, 7)) == wanted / 2**23


def test_gumbel_and_normal():
    key = stream(slot_keys(torch.tensor(1), torch.arange(4)), Purpose.NOISE)
    values = gumbel(key, 15_000).flatten().double()
    assert stats.kstest(values.numpy(), "gumbel_r").pvalue > P_PASS
    assert abs(values.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * len(values))
    for count in (14_999, 15_000):  # Box-Muller makes them in pairs
        values = normal(key, count)
        assert values.shape == (4, count)
        assert stats.kstest(values.flatten().numpy(), "norm").pvalue > P_PASS
        half = (count + 1) // 2
        pair = np.corrcoef(values[:, : count - half].flatten(), values[:, half:].flatten())[0, 1]
        assert abs(pair) < 5 / math.sqrt(2 * count)
        squares = np.corrcoef(values[:, : count - half].flatten() ** 2, values[:, half:].flatten() ** 2)[0, 1]
        assert abs(squares) < 5 / math.sqrt(2 * count)


def test_perturbed_maximum_draws_the_law():
    law = torch.tensor([0.0625, 0.5, 0.0, 0.3125, 0.125])
    key = stream(slot_keys(torch.arange(COUNT), torch.tensor(0)), Purpose.GUMBEL)
    counts = (law.log() + gumbel(key, 5)).argmax(-1).bincount(minlength=5).numpy()
    assert counts[2] == 0
    likely = [0, 1, 3, 4]
    assert stats.chisquare(counts[likely], COUNT * law.double().numpy()[likely]).pvalue > P_PASS


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 512, 8192])
def test_integers(bound):
    values = integers(stream(slot_keys(torch.arange(COUNT), torch.tensor(2)), Purpose.INITIAL), bound)
    assert values.dtype == torch.long
    assert 0 <= values.min() <= values.max() < bound
    cells = np.bincount((values * min(bound, 64) // bound).numpy(), minlength=min(bound, 64))
    expected = np.bincount(np.arange(bound) * min(bound, 64) // bound) * COUNT / bound
    assert bound == 1 or stats.chisquare(cells, expected).pvalue > P_PASS
