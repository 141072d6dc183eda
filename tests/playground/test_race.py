"""A race draws what `decode` draws, in fair turns; a stopped one leaves no buffers; equality is compared."""

import gc
import itertools
import weakref

import pytest

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.playground import race as racing
from sjd2_lightning.playground.offer import single
from sjd2_lightning.playground.race import Race, StoppedError
from tests.tools.small_evaluation import METHODS, SIDE, small_backbone

ITEM = single("red cat", 7)
KNOWN = {**METHODS, "exact": DecodingConfig("sjd", window=6, acceptance="exact")}


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


def race_of(backbone, *names: str) -> Race:
    return Race(backbone, ITEM, {name: KNOWN[name] for name in names}, backbone.layout(SIDE, SIDE))


def never() -> bool:
    return False


def test_each_draws_what_it_would_draw_alone(backbone):
    race = race_of(backbone, *METHODS)
    race.run(never)
    for runner in race.runners:
        layout = backbone.layout(SIDE, SIDE)
        alone = decode(backbone, [ITEM.prompt], [ITEM.seed], METHODS[runner.name], layout)
        assert runner.image_ids == tuple(alone.image_ids.flatten().tolist())
        assert runner.seen.num_passes == int(alone.stats.nfe[0])
        assert len(runner.clock) == runner.seen.num_passes + 1
        assert runner.clock == sorted(runner.clock)


def test_who_has_taken_least_time_goes_next(backbone, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(racing.time, "perf_counter", lambda: next(clock))  # every pass takes one second
    race = race_of(backbone, "ar", "sjd")
    turns = []

    def stopped() -> bool:
        turns.append([runner.seen.num_passes for runner in race.runners])
        return False

    race.run(stopped)
    both = [(first, second) for first, second in turns if second < race.runners[1].seen.num_passes]
    assert len(both) > 5
    assert all(abs(first - second) <= 1 for first, second in both)


def test_a_stopped_race_leaves_no_buffers_and_the_next_one_works(backbone):
    race = race_of(backbone, "ar", "sjd2")
    caches = []

    def stopped() -> bool:
        caches.extend(
            weakref.ref(runner._batch.cache)
            for runner in race.runners
            if runner._batch is not None and not caches
        )
        return race.runners[0].seen.num_passes >= 3

    with pytest.raises(StoppedError):
        race.run(stopped)
    gc.collect()
    assert caches
    assert all(cache() is None for cache in caches)
    assert not race.done
    assert race.verdict() is None
    after = race_of(backbone, "ar", "sjd2")
    after.run(never)
    assert after.verdict() == "Same image: all 16 tokens are equal."


def test_an_error_leaves_no_buffers_either(backbone):
    race = race_of(backbone, "ar", "sjd")
    broken = RuntimeError("out of memory")

    def stopped() -> bool:
        raise broken

    with pytest.raises(RuntimeError):
        race.run(stopped)
    assert race.runners[0]._batch is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sjd2", "Same image: all 16 tokens are equal."),
        ("exact", "Another image of the same law, as another seed would give: "),
        ("sjd2_paper", "Another image, and of another law: "),
    ],
)
def test_nothing_is_called_the_same_before_it_was_compared(backbone, name, expected):
    race = race_of(backbone, "ar", name)
    said = []

    def stopped() -> bool:
        said.append(race.verdict())
        return False

    race.run(stopped)
    assert set(said) == {None}
    assert race.verdict().startswith(expected)


def test_replay_that_differs_is_not_called_the_same(backbone):
    race = race_of(backbone, "ar", "sjd2")
    race.run(never)
    ids = race.runners[1].image_ids
    race.runners[1].image_ids = (ids[0] + 1, *ids[1:])
    assert race.share_equal() == 15 / 16
    assert race.verdict().startswith("Not the same image, though both replay: 94 % of the tokens are equal.")
