import pytest

from sjd2_lightning.run import harmless as module
from sjd2_lightning.run.harmless import harmless


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr(module, "_said", set())


def test_a_failure_is_said_once_and_nothing_ends(caplog):
    for _ in range(3):
        with harmless("writing a table"):
            raise OSError(28, "No space left on device")
    with harmless("writing another"):
        raise ValueError
    assert [record.getMessage() for record in caplog.records] == [
        "writing a table failed; the run goes on without it: [Errno 28] No space left on device",
        "writing another failed; the run goes on without it: ValueError",
    ]


def test_a_function_that_is_guarded_works_as_before():
    @harmless("counting")
    def half(number):
        return 1 / number

    assert [half(2), half(0), half(4)] == [0.5, None, 0.25]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_end_is_an_end(end):
    with pytest.raises(end), harmless("waiting"):
        raise end
