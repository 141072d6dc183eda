import logging
import time

import pytest

from sjd2_lightning.run import stages
from sjd2_lightning.run.stages import counted, duration, foretell, speak, stage


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(stages, "FIRST_WORD", 0.05)
    caplog.set_level(logging.INFO, logger=stages.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_long_stage_is_heard_of_and_timed(lines, monkeypatch):
    monkeypatch.setattr(stages, "_WORTH_A_LINE", 0.1)
    with stage("reading", lambda: "2 of 3"):
        time.sleep(0.3)
    *during, end = lines()
    assert during
    assert all(line == "reading: 0 s so far, 2 of 3" for line in during)
    assert end == "reading: 0.3 s"


def test_a_short_stage_says_nothing(lines):
    with stage("reading"):
        pass
    assert not lines()


def test_only_the_first_process_speaks(lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with stage("reading"):
        time.sleep(0.2)
    assert not lines()


def test_a_stage_that_fails_is_silent_afterwards(lines):
    with pytest.raises(ValueError, match="broken"), stage("reading"):
        raise ValueError("broken")
    time.sleep(0.2)
    assert not lines()


def test_of_stages_inside_one_another_the_innermost_speaks(lines):
    with stage("training"):
        with stage("validating"):
            time.sleep(0.2)
        assert set(lines()) == {"validating: 0 s so far"}
        time.sleep(0.2)
    assert lines()[-1] == "training: 0 s so far"


def test_a_count_is_a_bar_on_a_terminal_and_lines_elsewhere(lines, monkeypatch, capsys):
    with counted("reading", 3, "files") as advance:
        advance(2, "of twelve")
        time.sleep(0.2)
    assert set(lines()) == {"reading: 0 s so far, 2 of 3 files of twelve"}
    assert "files" not in capsys.readouterr().out
    monkeypatch.setattr(stages, "is_watched", lambda: True)
    with counted("reading", 3, "files") as advance:
        advance(3)
    assert "3/3" in capsys.readouterr().out


def test_a_command_without_hydra_speaks(monkeypatch, capsys):
    own = logging.getLogger("sjd2_lightning")
    monkeypatch.setattr(own, "handlers", [])
    monkeypatch.setattr(own, "level", own.level)
    speak()
    speak()
    stages.log.info("a line")
    assert capsys.readouterr().err == "a line\n"


def test_a_count_tells_how_much_time_is_left(lines, monkeypatch):
    monkeypatch.setattr(stages, "_MEASURED", 0.05)
    with counted("reading", 100, "files") as advance:
        time.sleep(0.1)
        advance(1)
        time.sleep(0.1)
    assert any("1 of 100 files, about " in line and line.endswith(" left") for line in lines())


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (130, "2 min"), (3 * 3600 + 600, "3.2 h")])
def test_times_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_what_takes_more_than_a_minute_is_foretold(lines):
    for seconds in (59.0, float("nan"), 61.0):
        foretell("decoding", seconds)
    assert lines() == ["decoding: about 61 s"]
