"""The table of code pairs: its numbers, its file, and what it is worth where the neighbour decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.decoding.config import PairSweeps
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict
from sjd2_lightning.decoding.variants.pairs import PairTable, Sweeper
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

AR = DecodingConfig("ar", window=1)


def test_table_holds_log_ratios_of_counts():
    counts = torch.tensor([[8.0, 2.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    table = PairTable.of_counts(counts, rank=3, prior=4.0)
    single = (np.array([9, 3, 2]) + 0.5) / 15.5
    wanted = np.log((counts.numpy() + 4 * single) / (counts.numpy().sum(1, keepdims=True) + 4) / single)
    assert np.allclose((table.left @ table.right.T).numpy(), wanted, atol=1e-6)
    assert np.allclose(wanted[2], 0), "a code that was never seen says nothing"


def test_a_lower_rank_is_the_nearest_table():
    counts = torch.randint(50, (9, 9), generator=torch.Generator().manual_seed(0)).double()
    whole, low = PairTable.of_counts(counts, 9), PairTable.of_counts(counts, 4)
    full = whole.left @ whole.right.T
    assert low.left.shape == low.right.shape == (9, 4)
    lost = torch.linalg.svdvals(full)[4:].square().sum()
    assert torch.allclose((full - low.left @ low.right.T).square().sum(), lost, rtol=1e-3)


def test_round_trip_and_foreign_files(tmp_path):
    table = PairTable.of_counts(torch.ones(5, 5, dtype=torch.float64), 5)
    table.save(tmp_path / "pairs.safetensors")
    again = PairTable.load(tmp_path / "pairs.safetensors", 5)
    for ours, theirs in zip(again, table, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.half().float())
    with pytest.raises(ValueError, match="is of 5 codes, the model has 6"):
        PairTable.load(tmp_path / "pairs.safetensors", 6)
    (tmp_path / "text.safetensors").write_text("not a table")
    with pytest.raises(ValueError, match="is no table of code pairs"):
        PairTable.load(tmp_path / "text.safetensors", 5)


@pytest.mark.parametrize("num_levels", [0, 1])
def test_images_stay_those_of_autoregression_in_fewer_passes(tmp_path, num_levels):
    """The table is the law of a model in which a code depends on the one to its left."""
    backbone = tiny_chameleon(12, hidden_size=16, seed=5, scale=0.5)
    layout = backbone.layout(10, 8)
    seeds = list(range(24))
    prompts = [RAGGED_PROMPTS[seed % 4] for seed in seeds]
    wanted = decode(backbone, prompts, seeds, AR, layout)
    images = decode(backbone, prompts * 8, list(range(100, 292)), AR, layout).image_ids
    counts = torch.zeros(12, 12, dtype=torch.float64)
    pairs = (images[..., :-1] * 12 + images[..., 1:]).flatten()
    counts += torch.bincount(pairs, minlength=144).view(12, 12)
    path = tmp_path / "pairs.safetensors"
    PairTable.of_counts(counts, 12).save(path)
    plain = DecodingConfig("sjd2", 16, num_levels)
    passes = {}
    for name, config in {"alone": plain, "swept": replace(plain, pairs=PairSweeps(str(path)))}.items():
        output = decode(backbone, prompts, seeds, config, layout)
        assert torch.equal(output.slot_ids, wanted.slot_ids)
        passes[name] = int(output.stats.nfe.sum())
    assert passes["swept"] < passes["alone"]


def test_a_table_that_was_made_anew_is_read_anew(tmp_path):
    """And a wrong one costs passes alone, never a token."""
    backbone = tiny_chameleon(7, seed=3, scale=0.4)
    layout, path = backbone.layout(6, 6), tmp_path / "pairs.safetensors"
    config = DecodingConfig("sjd2", 9, 1, pairs=PairSweeps(str(path), 3.0))
    outputs = []
    for seed in (0, 1):
        PairTable(*torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(seed))).save(path)
        outputs.append(decode(backbone, RAGGED_PROMPTS, [0, 1, 2, 3], config, layout))
    assert torch.equal(outputs[0].slot_ids, outputs[1].slot_ids)
    assert outputs[0].stats.accepted != outputs[1].stats.accepted


def test_a_table_of_another_vocabulary_is_refused_before_the_first_pass(tmp_path):
    path = tmp_path / "pairs.safetensors"
    PairTable(torch.ones(6, 2), torch.ones(6, 2)).save(path)
    backbone = tiny_chameleon(7)
    config = DecodingConfig("sjd2", 4, 1, pairs=PairSweeps(str(path)))
    with pytest.raises(ValueError, match="is of 6 codes, the model has 7"):
        decode(backbone, ["red cat"], [0], config, backbone.layout(4, 4))


def test_of_a_row_end_to_the_left_nothing_is_known(tmp_path):
    """It is not taken for a code: what stands behind it stays what the pass said."""
    path = tmp_path / "pairs.safetensors"
    left = torch.zeros(3, 2)
    left[2] = 50.0  # of the last code, which a clamped row end would be
    PairTable(left, torch.eye(3)[:, :2]).save(path)
    sweeper = Sweeper(PairSweeps(str(path)), torch.zeros(4, 5), 3)
    tokens = torch.tensor([[3, 1]])
    log = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    slots = Slots(
        tokens=tokens,
        levels=torch.tensor([[1, 0]]),  # the pass read the law behind noise
        is_code=torch.tensor([[False, True]]),
        gumbel=torch.zeros(1, 2, 3),
    )
    drawn = torch.tensor([[3, 2]])
    verdict = Verdict(drawn, torch.zeros(1, 2, dtype=torch.bool), drawn)
    settled = torch.zeros(1, 2, dtype=torch.bool)
    assert sweeper(slots, verdict, Scores(log), settled).tolist() == [[3, 2]]
