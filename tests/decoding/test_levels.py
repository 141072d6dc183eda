"""Noise of the drafted slots: the paper's step with the next drafts, and which slots skip levels."""

import pytest
import torch

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.levels import Gaussian, NoiseLevels, TableMean
from sjd2_lightning.decoding.randomness import Purpose, normal, slot_keys, stream
from sjd2_lightning.decoding.rules import Scores, Slots
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.noise import NoiseProcess, denoise

RNG = torch.Generator().manual_seed(0)
TABLE = torch.randn(6, 4, generator=RNG)  # five codes and the end of a row
SPACE = EmbeddingSpace(TABLE[:5])
LEVELS = torch.tensor([[0, 1, 2, 3], [3, 3, 2, 0]])
SLOTS = Slots(
    tokens=torch.tensor([[1, 2, 3, 4], [0, 1, 2, 5]]),
    is_code=torch.ones(2, 4, dtype=torch.bool),
    levels=LEVELS,
    noisy=torch.randn(2, 4, 4, generator=RNG),
)
DRAFTS = torch.tensor([[1, 0, 3, 4], [0, 4, 1, 5]])
SCORES = Scores(torch.randn(2, 4, 5, generator=RNG))


def levels_of(level_rule="age", confidence=0.9, **noise):
    config = DecodingConfig(
        "sjd2", 4, 3, level_rule=level_rule, confidence=confidence, noise=NoiseProcess(**noise)
    )
    return NoiseLevels(config, TABLE, SPACE, Gaussian(4))


@pytest.mark.parametrize("schedule", ["linear", "karras"])
def test_slots_take_the_papers_step_towards_their_next_draft(schedule):
    levels = levels_of(schedule=schedule)
    t = NoiseProcess(schedule=schedule).grid(3)
    x0_hat = SPACE.normalise(TABLE)[DRAFTS]
    s = t[(LEVELS - 1).clamp_min(0)][..., None]
    wanted = denoise(SLOTS.noisy, x0_hat, t[LEVELS][..., None], s)
    found = levels.cleaner(SLOTS, DRAFTS, SCORES)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(found[LEVELS <= 1], x0_hat[LEVELS <= 1]), "the last step ends at the draft"


def test_expected_estimates_are_means_under_the_law():
    found = levels_of(estimate="expected", state="draft").cleaner(SLOTS, DRAFTS, SCORES)
    wanted = SCORES.probs @ SPACE.normalise(TABLE[:5])
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_law_that_nobody_reads_is_not_made():
    scores = Scores(torch.randn(2, 4, 5))
    levels_of().cleaner(SLOTS, DRAFTS, scores)
    levels_of("stable").lower(SLOTS, DRAFTS, scores)
    assert "probs" not in vars(scores)


def test_each_pass_takes_one_level_and_the_rules_skip():
    one_less = (LEVELS - 1).clamp_min(0)
    assert torch.equal(levels_of().lower(SLOTS, DRAFTS, SCORES), one_less)
    stable = levels_of("stable").lower(SLOTS, DRAFTS, SCORES)
    same = (SLOTS.tokens == DRAFTS) & (LEVELS < 3)
    assert same[LEVELS > 1].any(), "the test would show nothing"
    assert torch.equal(stable, one_less.masked_fill(same, 0))
    chance = SCORES.probs.gather(-1, DRAFTS.clamp_max(4)[..., None])[..., 0]
    bar = float(chance[LEVELS > 1].median())
    confident = levels_of("confident", bar).lower(SLOTS, DRAFTS, SCORES)
    assert torch.equal(confident, one_less.masked_fill(chance >= bar, 0))
    assert (confident < one_less).any()


def test_starts_are_of_the_slot_alone():
    keys = slot_keys(torch.tensor([[5], [6]]), torch.arange(3)[None])
    assert torch.equal(Gaussian(4)(keys), normal(stream(keys, Purpose.NOISE), 4))
    origin = TableMean(4)(keys)
    assert torch.allclose(SPACE.denormalise(origin), TABLE[:5].mean(0).expand(2, 3, 4), atol=1e-6)


def test_every_noisy_level_has_a_timestep_token():
    assert levels_of().timestep_tokens().shape == (3, 4)
    none = NoiseLevels(DecodingConfig("sjd", 4), TABLE, SPACE, Gaussian(4))
    assert len(none.timestep_tokens()) == 0
