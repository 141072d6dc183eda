"""A run that is stopped and continued is the uninterrupted run, to the last bit."""

from itertools import pairwise, product
from typing import Any

import pytest

from tests.tools.training_runs import (
    STOPS,
    differences,
    make_folder,
    places,
    run,
    scenarios,
    scenarios_on_ranks,
    state_of,
)

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

MATRIX = [
    pytest.param(
        ranks, workers, name, marks=() if (ranks, workers, name) == (1, 0, "adamw") else pytest.mark.slow
    )
    for ranks, workers, name in product((1, 2), (0, 2), ("adamw", "muon"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("ranks", "workers", "name"), MATRIX)
def test_continuing_is_bitwise(folder, tmp_path, ranks, workers, name):
    overrides = [f"data.num_workers={workers}", f"optimizer={name}", f"trainer.devices={ranks}"]
    overrides += ["trainer.strategy=ddp"] if ranks > 1 else []
    # ranks of one run would prepare the shards at once, each in its process: the first one does it
    found = (
        [scenarios(folder, tmp_path, overrides)]
        if ranks == 1
        else scenarios_on_ranks(ranks, folder, tmp_path, overrides)
    )
    for rank in found:
        (whole, status), *_ = rank["whole"]
        assert status == 0
        assert [batch["step"] for batch in whole] == [step for step in range(8) for _ in range(2)]
        assert len({batch["loss"] for batch in whole}) == len(whole)
        for way, stops in STOPS.items():
            ends = [0, *(2 * (stop + 1) for stop in stops), len(whole)]
            assert [status for _, status in rank[way]] == [143, 143, 0]
            for (start, end), (part, _) in zip(pairwise(ends), rank[way], strict=True):
                assert part == whole[start:end], (way, start)
        ((rest, done),) = rank["path"]
        assert done == 0
        assert rest == whole[8:]
    wanted = state_of(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert wanted["global_step"] == 8
    for way in ("auto/run", "last/run", "path"):
        state = state_of(tmp_path / way / "checkpoints" / "last.ckpt")
        assert not differences(wanted, state), way


def test_going_on_twice_at_ends_of_epochs(folder, tmp_path):
    settings = ("trainer.max_steps=6", "data.batch_size=12", "callbacks.checkpoint.every_n_train_steps=1")
    settings += ("callbacks.checkpoint.save_top_k=-1", "trainer.val_check_interval=2")

    def start(name: str, *overrides: str) -> list[dict[str, Any]]:
        return run([*places(folder, tmp_path / name), *settings, *overrides])[0]

    def saved(name: str, step: int) -> str:
        (path,) = (tmp_path / name / "checkpoints").glob(f"epoch_*-step_{step}.ckpt")
        return f"ckpt_path='{path}'"

    start("first", "trainer.max_steps=1")  # what is imported late draws random numbers
    whole = start("whole")
    assert len({str(batch["keys"]) for batch in whole}) == 6, "the epochs differ in their order"
    assert start("once", saved("whole", 2)) == whole[2:]
    assert start("twice", saved("once", 4)) == whole[4:]
