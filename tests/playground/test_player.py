"""Watchers see a race go on to its end; who stops or leaves frees the thread for the next one."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.playground import player as playing
from sjd2_lightning.playground.offer import single
from sjd2_lightning.playground.player import Player
from sjd2_lightning.playground.race import Race, Runner
from tests.tools.small_evaluation import METHODS, SIDE, small_backbone

PASS_S = 0.02  # seconds of a pass of the tests: 19 of them can be watched


@pytest.fixture(scope="module")
def backbone():
    return small_backbone()


@pytest.fixture
def player():
    player = Player()
    yield player
    player.close()


@pytest.fixture(autouse=True)
def slow(monkeypatch):
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda self: (time.sleep(PASS_S), step(self))[1])
    monkeypatch.setattr(playing, "INTERVAL", 0.05)


def race_of(backbone, prompt: str = "red cat") -> Race:
    methods = {name: METHODS[name] for name in ("ar", "sjd2")}
    return Race(backbone, single(prompt, 7), methods, backbone.layout(SIDE, SIDE))


def test_frames_go_on_to_the_end(backbone, player):
    frames = list(player.watch("a", race_of(backbone)))
    passes = [sum(side.passes for side in frame.sides) for frame in frames]
    assert len(frames) >= 5
    assert passes == sorted(passes)
    assert len(set(passes[:-1])) == len(passes) - 1, "a frame that shows nothing new is not drawn"
    assert {frame.state for frame in frames[:-1]} == {"drawing"}
    assert {frame.verdict for frame in frames[:-1]} == {None}
    assert frames[-1].state == "done"
    assert frames[-1].verdict == "Same image: all 16 tokens are equal."


def test_a_slow_watcher_does_not_hold_decoding_up_and_sees_the_newest(backbone, player):
    race = race_of(backbone)
    frames = player.watch("a", race)
    first = next(frames)
    time.sleep(10 * PASS_S)
    behind = race.runners[0].seen.num_passes
    second = next(frames)
    assert second.sides[0].passes >= behind > first.sides[0].passes + 1
    list(frames)


def test_drawing_takes_a_small_share_of_the_time(backbone, player, monkeypatch):
    drawn, spent = playing.sides, [0.0]
    monkeypatch.setattr(playing, "sides", lambda race: (spent.append(spent.pop() + 0.02), drawn(race))[1])
    monkeypatch.setattr(playing.time, "thread_time", lambda: spent[0])
    start = time.monotonic()
    num_frames = len(list(player.watch("a", race_of(backbone))))
    assert 2 <= num_frames <= 3 + (time.monotonic() - start) / 0.2


def test_stop_ends_before_the_next_pass(backbone, player):
    race = race_of(backbone)
    frames = player.watch("a", race)
    next(frames)
    player.stop("b")
    assert not race.done
    player.stop("a")
    rest = list(frames)
    assert rest[-1].state == "stopped"
    assert rest[-1].verdict is None
    assert race.runners[0].seen.num_passes < 5
    assert list(player.watch("a", race_of(backbone)))[-1].state == "done"


def test_who_leaves_frees_the_thread(backbone, player):
    race = race_of(backbone)
    frames = player.watch("a", race)
    next(frames)
    frames.close()
    assert list(player.watch("b", race_of(backbone, "dog")))[-1].state == "done"
    assert not race.done


def test_who_asks_no_more_is_taken_to_have_left(backbone, player, monkeypatch):
    monkeypatch.setattr(playing, "PATIENCE", 0.1)
    race = race_of(backbone)
    frames = player.watch("a", race)
    next(frames)
    time.sleep(0.2)
    passes = race.runners[0].seen.num_passes
    time.sleep(0.1)
    assert race.runners[0].seen.num_passes == passes < 15
    assert list(frames)[-1].state == "stopped"


def test_watchers_wait_for_each_other(backbone, player):
    first, second = race_of(backbone), race_of(backbone, "dog")
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(lambda: list(player.watch("a", first)))
        time.sleep(0.05)
        waiting = player.watch("b", second)
        frame = next(waiting)
        assert (frame.state, frame.num_before) == ("waiting", 1)
        assert [side.passes for side in frame.sides] == [0, 0]
        seen = list(waiting)
        assert one.result()[-1].state == "done"
    last = seen[-1]
    assert {(frame.state, frame.num_before) for frame in seen} == {("drawing", 0), ("done", 0)}
    assert last.state == "done"
    assert last.verdict == "Same image: all 16 tokens are equal."


def test_a_race_that_is_over_holds_nobody_up(backbone, player, monkeypatch):
    """Whatever its thread has left to tidy up."""
    run = Race.run
    monkeypatch.setattr(Race, "run", lambda self, stop: (run(self, stop), time.sleep(5 * PASS_S)))
    first = race_of(backbone)
    frames = player.watch("a", first)
    next(frames)
    while not first.done:
        time.sleep(PASS_S)
    assert {frame.num_before for frame in player.watch("b", race_of(backbone, "dog"))} == {0}
    assert list(frames)[-1].state == "done"


def test_one_who_waits_can_stop_at_once(backbone, player):
    first = race_of(backbone)
    frames = player.watch("a", first)
    next(frames)
    waiting = player.watch("b", race_of(backbone))
    next(waiting)
    player.stop("b")
    assert [frame.state for frame in waiting] == ["stopped"]
    assert not first.done
    assert list(frames)[-1].state == "done"


def test_errors_of_decoding_reach_the_watcher(backbone, player):
    race = race_of(backbone)
    race.item = PromptItem("prompt", " ", 1)
    with pytest.raises(ValueError, match="empty prompt"):
        list(player.watch("a", race))
