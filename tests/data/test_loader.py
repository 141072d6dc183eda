"""Batches: order, equal epochs, exact continuation, and the bound on unusable samples."""

from __future__ import annotations

import itertools
import logging
import pickle

import pytest
import torch

from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.loader import Batch, CodeDataset, CodeLoader
from sjd2_lightning.data.reading import BadDataError
from tests.tools.shards import WriteCodes


def loader(index: ShardIndex, num_workers: int = 0, train: bool = True, **options: object) -> CodeLoader:
    defaults = {"batch_size": 4, "shuffle_buffer": 6, "seed": 3}
    return CodeLoader(CodeDataset(index, train=train, **(defaults | options)), num_workers)  # type: ignore[arg-type]


def keys(batches: CodeLoader) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def truncate(index: ShardIndex, number: int) -> None:
    path = index.folder / index.shards[number].name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_what_was_written(write_codes: WriteCodes, num_workers: int) -> None:
    batches = list(loader(write_codes(50), num_workers))
    assert len(batches) == 12
    for batch in batches:
        assert isinstance(batch, Batch)
        assert batch.image_ids.shape == (4, 2, 3)
        assert batch.image_ids.dtype == torch.int64
        for key, caption, image_ids in zip(*batch, strict=True):
            assert caption == f"picture {key[1:]}"
            assert image_ids[0, 0] == int(key[1:])


def test_order_changes_with_epoch_and_seed_and_is_reproducible(write_codes: WriteCodes) -> None:
    index = write_codes(48)
    first = loader(index)
    epochs = [keys(first) for _ in range(2)]
    again = loader(index)
    assert [keys(again) for _ in range(2)] == epochs
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"k{i}" for i in range(48))
    assert keys(loader(index, seed=4)) != epochs[0]
    again.set_epoch(1)
    assert keys(again) == epochs[1]


def test_workers_start_by_pickling_too(write_codes: WriteCodes) -> None:
    data = loader(write_codes(48)).data
    copy = pickle.loads(pickle.dumps(data))
    assert [batch.keys for batch, _ in copy] == [batch.keys for batch, _ in data]


def test_order_is_not_the_written_one(write_codes: WriteCodes) -> None:
    order = [int(key[1:]) for key in keys(loader(write_codes(48), shuffle_buffer=48))]
    assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 12


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
@pytest.mark.parametrize("train", [True, False])
def test_each_sample_once_over_ranks_and_workers(
    write_codes: WriteCodes, world_size: int, num_workers: int, train: bool
) -> None:
    index = write_codes(48)
    ranks = [loader(index, num_workers, train, rank=r, world_size=world_size) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = [key for rank in ranks for key in keys(rank)]
    assert sorted(seen) == sorted(f"k{i}" for i in range(48))


def test_samples_left_out_of_an_epoch_differ_between_epochs(write_codes: WriteCodes) -> None:
    batches = loader(write_codes(51, samples_per_shard=100))
    assert {key for _ in range(12) for key in keys(batches)} == {f"k{i}" for i in range(51)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_keeps_the_written_order(write_codes: WriteCodes, num_workers: int) -> None:
    batches = loader(write_codes(50), num_workers, train=False)
    assert keys(batches) == keys(batches) == [f"k{i}" for i in range(50)]


def test_num_samples_uses_the_first_ones(write_codes: WriteCodes) -> None:
    assert sorted(keys(loader(write_codes(50), num_samples=12))) == sorted(f"k{i}" for i in range(12))


@pytest.mark.parametrize(("num_workers", "num_batches"), [(0, 0), (0, 5), (0, 12), (2, 5)])
def test_continues_exactly_inside_an_epoch(
    write_codes: WriteCodes, num_workers: int, num_batches: int
) -> None:
    index = write_codes(50)
    whole = loader(index, num_workers)
    wanted = [batch.keys for _ in range(2) for batch in whole]
    stopped = loader(index, num_workers)
    iterator = iter(stopped)
    for _ in range(num_batches):
        next(iterator)
    continued = loader(index, num_workers)
    continued.load_state_dict(stopped.state_dict())
    assert continued.state_dict() == stopped.state_dict() or num_batches == 12
    num_epochs = 1 if num_batches == 12 else 2
    assert [batch.keys for _ in range(num_epochs) for batch in continued] == wanted[num_batches:]


def test_the_state_of_rank_0_serves_every_rank(write_codes: WriteCodes) -> None:
    index = write_codes(50)
    ranks = [loader(index, rank=rank, world_size=2) for rank in range(2)]
    wanted = [[batch.keys for batch in rank] for rank in ranks]
    stopped = loader(index, rank=0, world_size=2)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    for rank in range(2):
        continued = loader(index, rank=rank, world_size=2)
        continued.load_state_dict(stopped.state_dict())
        assert [batch.keys for batch in continued] == wanted[rank][2:]


def test_state_of_another_order_starts_the_epoch_anew(
    write_codes: WriteCodes, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_codes(50)
    stopped = loader(index)
    next(iter(stopped))
    other = loader(index, batch_size=5)
    other.load_state_dict(stopped.state_dict())
    assert "batch_size changed since the checkpoint" in caplog.text
    assert len(keys(other)) == 50


def test_reading_leaves_the_global_random_state_alone(write_codes: WriteCodes) -> None:
    before = torch.get_rng_state()
    keys(loader(write_codes(50)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("num_workers", "train"), [(0, True), (0, False), (2, True)])
def test_a_damaged_shard_keeps_the_epoch_length(
    write_codes: WriteCodes, num_workers: int, train: bool, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_codes(48)
    truncate(index, 2)
    batches = loader(index, num_workers, train, max_bad_samples=8)
    with caplog.at_level(logging.WARNING):
        first = keys(batches)
    assert len(first) == 48
    assert 0 < batches.num_skipped <= 8
    assert "train-00002.tar" in caplog.text
    num_warnings = len(caplog.records)
    if not train and not num_workers:
        keys(batches)
        assert len(caplog.records) == num_warnings, "the same damage was reported again"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_much_damage_stops_the_run_with_one_error(write_codes: WriteCodes, num_workers: int) -> None:
    index = write_codes(48)
    for number in range(6):
        truncate(index, number)
    with pytest.raises(
        BadDataError, match=r"unusable in epoch 0, 8 are allowed .*e\.g\. train-0000"
    ) as caught:
        keys(loader(index, num_workers, max_bad_samples=8))
    assert "Traceback" not in str(caught.value)


def test_nothing_readable_stops_the_run(write_codes: WriteCodes) -> None:
    index = write_codes(8)
    (index.folder / index.shards[0].name).write_bytes(b"")
    with pytest.raises(BadDataError, match="8 samples"):
        keys(loader(index, max_bad_samples=100))
