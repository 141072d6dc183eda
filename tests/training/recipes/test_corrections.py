"""A corrector that is learnt from a model's own decodings: what is kept of them, and what it is worth."""

from dataclasses import replace

import pytest
import torch

from sjd2_lightning.cli.correct import learnt
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Correction
from sjd2_lightning.decoding.variants.first_drafts import neighbours
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.training.recipes.corrections import CorrectorRecipe, Learner, traces_of
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

PIXELS, WINDOW = (16, 16), 10  # longer than a row of 8 codes and its end


@pytest.fixture(scope="module")
def backbone():
    """A model in which a code depends on the one to its left."""
    return tiny_chameleon(12, hidden_size=16, seed=5, scale=0.8).requires_grad_(False)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("num_levels", [0, 2])
def test_scores_of_traces_are_those_of_the_passes(backbone, num_levels, guidance):
    """The best code before correction is what the pass itself made of the slot."""
    layout = backbone.layout(*PIXELS)
    config = DecodingConfig("sjd2", WINDOW, num_levels, sampling=Sampling(0.8, guidance_scale=guidance))
    prompts, seeds = list(RAGGED_PROMPTS[:2]), [3, 4]
    seen = []
    final = decode(backbone, prompts, seeds, config, layout, seen.append).slot_ids
    traces = traces_of(backbone, prompts, seeds, config, layout, 10**6)
    is_code = [forced < 0 for forced in layout.forced]
    upper = neighbours(layout, "repeat_above", layout.num_slots).tolist()
    wanted = []
    for this in seen:
        for row, (image, head) in enumerate(zip(this.rows.tolist(), this.heads.tolist(), strict=True)):

            def was(slot, this=this, row=row, head=head, ids=final[image]):
                """What the pass was fed there, or what had been committed."""
                if slot < head:
                    return min(int(ids[slot]), 12) if slot >= 0 else 12
                place = slot - head
                return 12 if this.levels[row, place] else min(int(this.drafts[row, place]), 12)

            for place in range(max(1, int(this.num_committed[row])), WINDOW):
                slot = head + place
                if slot >= layout.num_slots or not is_code[slot]:
                    continue
                became = [min(int(final[image, at]), 12) if at >= 0 else 12 for at in (slot - 1, upper[slot])]
                own = int(this.tokens[row, place]), int(final[image, slot])
                wanted.append((*own, became, [was(slot - 1), was(upper[slot])]))
    learner = Learner(backbone, 0.8, DraftCorrector(16, 4))
    before, change = learner.scores(traces)
    fields = (before.argmax(-1), traces.codes, traces.new, traces.old)
    assert sorted(zip(*(field.tolist() for field in fields), strict=True)) == sorted(wanted)
    assert not change.any()
    assert len(traces_of(backbone, prompts, seeds, config, layout, 5).codes) == 10


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_saves_passes_of_other_images(backbone, guidance, tmp_path):
    config = DecodingConfig("sjd2", 12, 1, sampling=Sampling(guidance_scale=guidance))
    prompts = [RAGGED_PROMPTS[number % 4] for number in range(160)]
    recipe = CorrectorRecipe(width=32, steps=600, batch=64, lr=3e-3)
    weights = [parameter.clone() for parameter in backbone.parameters()]
    network, (alone, corrected) = learnt(backbone, prompts, [config], PIXELS, recipe, batch=32)
    assert all(map(torch.equal, weights, backbone.parameters()))
    assert corrected > alone + 0.05
    path = tmp_path / "corrector.safetensors"
    network.save(path)
    layout, seeds = backbone.layout(*PIXELS), list(range(1000, 1024))
    passes = {}
    for name, its in {"alone": config, "corrected": replace(config, corrector=Correction(str(path)))}.items():
        passes[name] = int(decode(backbone, prompts[:24], seeds, its, layout).stats.nfe.sum())
    assert passes["corrected"] < 0.93 * passes["alone"]

    again, _ = learnt(
        backbone,
        prompts[:4],
        [replace(config, corrector=Correction(str(path)))],
        PIXELS,
        replace(recipe, steps=1),
    )
    moved = max(
        (new - old).abs().max() for new, old in zip(again.parameters(), network.parameters(), strict=True)
    )
    assert 0 < moved < 0.02, "a training that starts from a corrector goes on with it"


def test_what_measures_does_not_train(backbone, monkeypatch):
    """Of few images too: a share of held-out drafts is of held-out drafts."""
    seen = {}
    monkeypatch.setattr(Learner, "fit", lambda self, slots, *_: seen.update(train=slots))
    monkeypatch.setattr(Learner, "right", lambda self, slots: seen.update(val=slots) or (0.0, 0.0))
    for num in (2, 3, 9):
        config = DecodingConfig("sjd2", 6, 1)
        learnt(backbone, list(RAGGED_PROMPTS * 3)[:num], [config], PIXELS, CorrectorRecipe(), batch=4)
        keys = [set(seen[part].keys.tolist()) for part in ("train", "val")]
        assert all(keys)
        assert not keys[0] & keys[1]


def test_the_same_seed_gives_the_same_network(backbone):
    config, recipe = DecodingConfig("sjd2", 6, 1), CorrectorRecipe(width=4, steps=20, batch=16)
    ways = [learnt(backbone, list(RAGGED_PROMPTS[:4]), [config], PIXELS, recipe)[0] for _ in range(2)]
    for one, other in zip(ways[0].parameters(), ways[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_scales_of_guidance_take_turns(backbone, monkeypatch):
    """A batch of images each, in what trains and in what measures."""
    seen = {}
    monkeypatch.setattr(Learner, "fit", lambda self, slots, *_: seen.update(train=slots))
    monkeypatch.setattr(Learner, "right", lambda self, slots: seen.update(val=slots) or (0.0, 0.0))
    methods = [DecodingConfig("sjd2", 6, 1, sampling=Sampling(guidance_scale=scale)) for scale in (1.5, 3.0)]
    recipe = CorrectorRecipe(val_share=0.5)
    learnt(backbone, list(RAGGED_PROMPTS * 2)[:8], methods, PIXELS, recipe, batch=8)
    for part in ("train", "val"):
        assert set(seen[part].scale.tolist()) == {1.5, 3.0}
