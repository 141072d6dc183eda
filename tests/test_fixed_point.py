"""Fixed points of random causal maps: all schedules end where the loop does, n passes settle n columns."""

import dataclasses

import pytest
import torch

from sjd2_lightning import fixed_point
from sjd2_lightning.fixed_point import Schedule, follow, solve, unroll

LENGTH = 13


class RandomMap:
    """x_j = tanh(a strictly causal mix of x_<j) * scale + b, in double precision."""

    length = LENGTH

    def __init__(self, seed: int, scale: float = 1.5) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(LENGTH, LENGTH, generator=draw, dtype=torch.float64)
        self.bias = torch.randn(2, LENGTH, 3, generator=draw, dtype=torch.float64)
        self.scale = scale
        self.held = torch.full((2, LENGTH, 3), torch.nan, dtype=torch.float64)
        self.fed: list[tuple[int, int]] = []

    def values(self, first, fed):
        last = first + fed.shape[1]
        self.fed.append((first, last))
        self.held = torch.cat([self.held[:, :first], fed, self.held[:, last:]], dim=1)
        seen = [self.mix[j + 1, : j + 1] @ self.held[:, : j + 1] for j in range(first, last)]
        return self.scale * torch.tanh(torch.stack(seen, dim=1)) + self.bias[:, first + 1 : last + 1]


def start(seed: int):
    guess = torch.randn(2, LENGTH, 3, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64)
    return guess


def loop(seed: int, **kwargs):
    return solve(RandomMap(seed, **kwargs), start(seed), Schedule(window=1))


SCHEDULES = [
    Schedule(tolerance=0),
    Schedule(window=3, tolerance=0),
    Schedule(window=LENGTH, tolerance=0, guess="zero"),
    Schedule(segments=4, tolerance=0),
    Schedule(segments=5, window=2, tolerance=0),
    Schedule(segments=LENGTH, tolerance=0),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_every_schedule_ends_at_the_loops_values(schedule, seed):
    found, wanted = solve(RandomMap(seed), start(seed), schedule), loop(seed)
    torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=1e-12)
    assert found.stats.num_generated.tolist() == [LENGTH - 1] * 2
    assert len(found.residuals) == found.stats.nfe[0] <= LENGTH - 1
    assert wanted.stats.nfe.tolist() == [LENGTH - 1] * 2


def test_a_loose_tolerance_saves_passes_and_holds_for_every_column():
    schedule = Schedule(tolerance=1e-2)
    causal = RandomMap(0, scale=0.2)
    found, exact = solve(causal, start(0), schedule), loop(0, scale=0.2)
    assert found.stats.nfe[0] < solve(RandomMap(0, scale=0.2), start(0), Schedule(tolerance=0)).stats.nfe[0]
    residual = (unroll(RandomMap(0, scale=0.2), found.values, 1) - found.values).abs().amax()
    assert residual <= 1e-2, "what is kept was fed, and agrees with the map's value"
    assert (found.values - exact.values).abs().amax() < 0.1


@pytest.mark.parametrize("num_passes", [1, 4, LENGTH - 1])
@pytest.mark.parametrize("seed", range(3))
def test_n_passes_make_n_columns_final_whatever_the_guess(num_passes, seed):
    found = unroll(RandomMap(seed), start(seed), num_passes)
    torch.testing.assert_close(found[:, : num_passes + 1], loop(seed).values[:, : num_passes + 1])
    if num_passes < LENGTH - 1:
        assert not torch.allclose(found[:, num_passes + 1], loop(seed).values[:, num_passes + 1])


def test_a_segment_that_was_cut_is_fed_again_before_the_next_one():
    cut = Schedule(segments=2, max_passes=2, tolerance=0)
    causal = RandomMap(1)
    found = solve(causal, start(1), cut)
    assert found.stats.committed[:, 0].tolist() == [1, 5, 1, 5]
    assert causal.fed == [(0, 6), (1, 6), (2, 12), (7, 12)]
    # the second segment is two passes from the values that were taken, not from what the cache held
    plain = RandomMap(1)
    plain.values(0, found.values[:, :7])
    torch.testing.assert_close(found.values[:, 7], plain.values(6, found.values[:, 6:7])[:, 0])


def test_a_cap_of_all_passes_is_exact_and_of_one_is_one_pass():
    most = solve(RandomMap(2), start(2), Schedule(max_passes=LENGTH - 1, tolerance=0))
    torch.testing.assert_close(most.values, loop(2).values)
    one = solve(RandomMap(2), start(2), Schedule(max_passes=1))
    torch.testing.assert_close(one.values, unroll(RandomMap(2), start(2), 1))
    assert one.stats.nfe.tolist() == [1, 1]


def test_windows_and_segments_bound_what_a_pass_is_fed():
    causal = RandomMap(3)
    solve(causal, start(3), Schedule(window=3, tolerance=0))
    assert max(last - first for first, last in causal.fed) == 3
    causal = RandomMap(3)
    solve(causal, start(3), Schedule(segments=4, tolerance=0))
    assert {last for _, last in causal.fed} == {3, 6, 9, 12}
    assert Schedule(segments=5).ends(LENGTH) == [3, 6, 9, 12]
    assert Schedule(segments=3).ends(9) == [3, 6, 8], "the last segment is shorter, none is left out"


class Overflowing(RandomMap):
    def values(self, first, fed):
        new = super().values(first, fed)
        wild = (fed.abs().amax((0, 2)) > 50)[:, None].expand(-1, 3)
        return torch.where(wild, torch.inf, new)


def test_iterates_that_overflow_begin_again_and_are_counted():
    guess = start(0)
    guess[:, 5] = 100
    found = solve(Overflowing(0), guess, Schedule(tolerance=0))
    torch.testing.assert_close(found.values, loop(0).values)
    assert found.num_nonfinite > 0
    guess[:, 7] = torch.nan
    torch.testing.assert_close(solve(Overflowing(0), guess, Schedule(tolerance=0)).values, loop(0).values)
    guess[:, 0] = 100
    with pytest.raises(ValueError, match="column 1 of the fixed point is not finite"):
        solve(Overflowing(0), guess, Schedule())


class Leaking(Overflowing):
    """Hides columns by a factor of 0, as attention does: what is not finite reaches all columns."""

    def values(self, first, fed):
        return super().values(first, fed) + 0 * fed.sum()


def test_no_iterate_that_overflows_is_fed():
    guess = start(0)
    guess[:, 5] = 100
    for schedule in (
        Schedule(tolerance=0),
        Schedule(window=4, tolerance=0),
        Schedule(segments=2, tolerance=0),
    ):
        torch.testing.assert_close(solve(Leaking(0), guess, schedule).values, loop(0).values)


def test_gradients_of_unroll_are_those_of_the_loop():
    def gradient(num_passes, guess):
        causal = RandomMap(4)
        causal.bias.requires_grad_()
        unroll(causal, guess, num_passes).square().sum().backward()
        return causal.bias.grad

    other = torch.cat([start(4)[:, :1], start(5)[:, 1:]], dim=1)
    wanted = gradient(LENGTH - 1, start(4))
    torch.testing.assert_close(gradient(LENGTH - 1, other), wanted)
    torch.testing.assert_close(gradient(LENGTH + 3, other), wanted)
    assert not torch.allclose(gradient(2, start(4)), wanted)
    causal = RandomMap(4)
    causal.bias.requires_grad_()
    values = follow(causal, other[:, :1])
    torch.testing.assert_close(values.detach(), loop(4).values)
    values.square().sum().backward()
    torch.testing.assert_close(causal.bias.grad, wanted)


def test_wrong_values_are_named():
    assert Schedule(segments=0).problems() == ["segments=0: must be at least 1"]
    assert Schedule(guess="random").problems() == ["guess='random': must be one of given, zero"]


# Each mutation of `solve` that the tests above must see.
MUTATIONS = {
    "accepts what changed": ("<= schedule.tolerance", "<= 1e3 + schedule.tolerance"),
    "one row decides": (".all(0)", ".any(0)"),
    "moves one column too far": ("cut else run + 1)", "cut else min(run + 2, end - head))"),
    "forgets a cut": ("cached = head + run + 1", "cached = head + (end - head if cut else run + 1)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(name, monkeypatch):
    import inspect

    old, new = MUTATIONS[name]
    source = inspect.getsource(fixed_point.solve)
    assert old in source
    scope = dict(vars(fixed_point))
    exec(source.replace(old, new), scope)
    broken = scope["solve"]
    right = RandomMap(1)
    if name == "forgets a cut":
        cut = Schedule(segments=2, max_passes=2, tolerance=0)
        assert not torch.equal(broken(right, start(1), cut).values, solve(RandomMap(1), start(1), cut).values)
        return
    wanted, found = loop(1).values, None
    guess = start(1)
    guess[0] = wanted[0]  # a row that agrees from the start
    try:
        found = broken(right, guess, dataclasses.replace(SCHEDULES[0])).values
    except RuntimeError:
        return
    assert (found - wanted).abs().amax() > 1e-6
