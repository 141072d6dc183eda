"""A drafter that is learnt from a model's own decodings: what is kept of them, and what it is worth."""

from dataclasses import replace

import pytest
import torch

from sjd2_lightning.cli.draft import learnt
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Drafting
from sjd2_lightning.decoding.randomness import gumbel
from sjd2_lightning.decoding.rules import Read, Scores
from sjd2_lightning.decoding.variants.drafter import BlockDrafts
from sjd2_lightning.models.block_drafter import BlockDrafter
from sjd2_lightning.training.recipes.drafting import BlockLearner, DrafterRecipe, windows_of
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

PIXELS = (16, 16)


@pytest.fixture(scope="module")
def backbone():
    """A model in which a code depends on the one to its left."""
    return tiny_chameleon(12, hidden_size=16, seed=5, scale=0.8).requires_grad_(False)


def test_guidance_of_a_window_is_that_of_its_last_slot(backbone):
    layout = backbone.layout(*PIXELS)
    sampling = Sampling(guidance_scale=3.0, guidance_schedule="linear")
    config = DecodingConfig("sjd2", 7, 1, sampling=sampling)
    windows = windows_of(backbone, list(RAGGED_PROMPTS[:1]), [3], config, layout, 10**6)
    scales = sampling.scales(layout.num_slots)
    assert len(windows.scale) > 3
    assert float(windows.scale.min()) >= float(scales[6])
    assert all(torch.isclose(scale, scales).any() for scale in windows.scale)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("num_levels", [0, 2])
def test_what_it_learns_from_is_what_decoding_shows_it(backbone, tmp_path, monkeypatch, num_levels, guidance):
    """Windows, drafts, places and noise of every pass behind which a code is drawn; and the same scores."""
    layout, path = backbone.layout(*PIXELS), tmp_path / "drafter.safetensors"
    torch.manual_seed(0)
    network = BlockDrafter(16, 8)
    torch.nn.init.normal_(network.out.weight)
    network.save(path)
    config = DecodingConfig("sjd2", 7, num_levels, sampling=Sampling(0.8, guidance_scale=guidance))
    prompts, seeds = list(RAGGED_PROMPTS[:1]), [3]
    # one that is asked and not heeded
    seen = []

    def guesses(self, scores, standing, places, noise, is_code):
        seen.append((scores.read.hidden, standing, places, noise, is_code))
        return torch.zeros_like(standing)

    monkeypatch.setattr(BlockDrafts, "guesses", guesses)
    drafted = replace(config, drafter=Drafting(str(path)))
    final = decode(backbone, prompts, seeds, drafted, layout).slot_ids[0]
    windows = windows_of(backbone, prompts, seeds, drafted, layout, 10**6)
    num_slots, starts = layout.num_slots, []
    held = {tuple(keys.tolist()): number for number, keys in enumerate(windows.keys)}
    asked = seen[: len(seen) // 2]
    head = 0
    for (hidden, standing, places, noise, _), num in zip(
        asked, decode(backbone, prompts, seeds, drafted, layout).stats.accepted[0], strict=True
    ):
        fresh = range(head + 7, head + 14)
        head += num
        codes = [int(final[slot]) if slot < num_slots and layout.forced[slot] < 0 else 12 for slot in fresh]
        if set(codes) == {12}:
            continue
        starts.append(head)
        matching = [
            number
            for number in held.values()
            if torch.allclose(windows.hidden[number].float(), hidden, atol=2e-3)
        ]
        assert len(matching) == 1
        (number,) = matching
        assert windows.codes[number].tolist() == codes
        assert windows.standing[number].tolist() == standing[0].tolist()
        assert int(windows.entered[number]) == num
        inside = torch.tensor([slot < num_slots for slot in fresh])
        assert torch.equal(windows.places[number, 7:][inside], places[0, 7:][inside])
        assert torch.equal(gumbel(windows.keys[number], 12)[inside], noise[0][inside])
        assert float(windows.scale[number]) == guidance
    assert len(starts) == len(windows.codes) > 3
    assert len(windows_of(backbone, prompts, seeds, drafted, layout, 2).codes) == 2


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_scores_are_those_of_decoding(backbone, tmp_path, guidance):
    layout, path = backbone.layout(*PIXELS), tmp_path / "drafter.safetensors"
    torch.manual_seed(1)
    network = BlockDrafter(16, 8)
    torch.nn.init.normal_(network.out.weight)
    network.save(path)
    network = BlockDrafter.load(path, 16)
    sampling = Sampling(0.8, guidance_scale=guidance)
    config = DecodingConfig("sjd2", 7, 1, sampling=sampling)
    windows = windows_of(backbone, RAGGED_PROMPTS[:2], [3, 4], config, layout, 10**6)
    lefts = torch.cat([windows.standing[:, -1:], torch.full_like(windows.codes[:, 1:], 12)], dim=1)
    scores = BlockLearner(backbone, 0.8, network).scores(windows, lefts)
    drafts = BlockDrafts(Drafting(str(path), rounds=0), sampling, backbone.slot_table(), 12)
    read = Read(windows.hidden.movedim(1, 0).flatten(0, 1), guidance)
    found = drafts.guesses(
        Scores(scores, read),
        windows.standing,
        windows.places,
        gumbel(windows.keys, 12),
        windows.codes < 12,
    )
    assert torch.equal(found, scores.argmax(-1))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_it_learns_what_other_images_hold(backbone, guidance):
    config = DecodingConfig("sjd2", 8, 1, sampling=Sampling(guidance_scale=guidance))
    prompts = [RAGGED_PROMPTS[number % 4] for number in range(96)]
    recipe = DrafterRecipe(width=32, steps=150, batch=16, lr=3e-3, least=8)
    weights = [parameter.clone() for parameter in backbone.parameters()]
    _, (alone, _) = learnt(backbone, prompts, [config], PIXELS, replace(recipe, steps=1), batch=32)
    _, (more, after) = learnt(backbone, prompts, [config], PIXELS, recipe, batch=32)
    assert all(map(torch.equal, weights, backbone.parameters()))
    assert more > alone + 0.05
    assert after > more, "who knows the true left neighbour guesses better"


def test_the_same_seed_gives_the_same_network(backbone):
    config, recipe = DecodingConfig("sjd2", 6, 1), DrafterRecipe(width=4, steps=10, batch=8)
    ways = [learnt(backbone, list(RAGGED_PROMPTS[:4]), [config], PIXELS, recipe)[0] for _ in range(2)]
    for one, other in zip(ways[0].parameters(), ways[1].parameters(), strict=True):
        assert torch.equal(one, other)
