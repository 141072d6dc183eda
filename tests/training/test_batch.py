"""What the trunk is fed in training: positions, noise, timestep tokens; and that decoding feeds the same."""

import numpy as np
import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.noise import timesteps
from sjd2_lightning.training.batch import NoisyCodes, code_logits, trunk_input
from tests.tools.slow_loop import Slot, SlowDecoder
from tests.tools.tiny_backbones import NOISY_LEVELS, RAGGED_PROMPTS, tiny_chameleon


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(7, seed=2, scale=0.5).requires_grad_(False)


@pytest.fixture(scope="module")
def batch(backbone):
    """Layout of 3 x 2 codes, prompts, codes, and noise of three levels."""
    layout = backbone.layout(6, 4)
    prompts = [backbone.prompt_ids(prompt, layout) for prompt in RAGGED_PROMPTS]
    rng = torch.Generator().manual_seed(0)
    image_ids = torch.randint(7, (4, 3, 2), generator=rng)
    noise = NoisyCodes(
        torch.tensor(NOISY_LEVELS), timesteps(3), torch.randn(4, 6, backbone.hidden_size, generator=rng)
    )
    return layout, prompts, image_ids, noise


def test_no_noise_is_what_transformers_computes_from_token_ids(backbone, batch):
    """Prompts, codes and newlines as one list of token ids, a row at a time, under transformers' own mask."""
    layout, prompts, image_ids, _ = batch
    logits = code_logits(backbone, trunk_input(backbone, prompts, image_ids, layout, None), layout)
    codes = backbone.slot_token_ids[:7]
    for row, prompt in enumerate(prompts):
        image: list[int] = []
        for line in image_ids[row].tolist():
            image += [4 + code for code in line] + [backbone.tokens.newline]
        ids = torch.tensor([prompt + image])
        hidden = backbone.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        places = [len(prompt) - 1 + slot for slot in (0, 1, 3, 4, 6, 7)]
        wanted = backbone.model.lm_head(hidden[places])[:, codes]
        assert torch.allclose(logits[row], wanted, atol=1e-5)


def test_all_clean_levels_are_no_noise_bit_for_bit(backbone, batch):
    layout, prompts, image_ids, noise = batch
    all_clean = noise._replace(levels=torch.zeros(4, 6, dtype=torch.long))
    clean = trunk_input(backbone, prompts, image_ids, layout, all_clean)
    none = trunk_input(backbone, prompts, image_ids, layout, None)
    assert clean.noisy is None is none.noisy
    for ours, theirs in zip(clean[:-1], none[:-1], strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_clean_rows_of_a_noisy_batch_are_as_without_noise(backbone, batch):
    layout, prompts, image_ids, noise = batch
    noisy = code_logits(backbone, trunk_input(backbone, prompts, image_ids, layout, noise), layout)
    clean = code_logits(backbone, trunk_input(backbone, prompts, image_ids, layout, None), layout)
    assert torch.allclose(noisy[1], clean[1], atol=1e-5)
    assert not torch.allclose(noisy[0], clean[0], atol=1e-2)


def test_embeddings_are_the_formula_slot_by_slot(backbone, batch):
    layout, prompts, image_ids, noise = batch
    fed = trunk_input(backbone, prompts, image_ids, layout, noise)
    table = backbone.model.model.embed_tokens.weight
    codes = table[4:11]
    mean, std = codes.mean(0), codes.std(0, correction=0)
    assert fed.num_side == 3
    assert fed.prompt_len == max(map(len, prompts))
    assert fed.embeddings.shape[1] == 3 + fed.prompt_len + layout.num_slots - 1
    for row, prompt in enumerate(prompts):
        start = 3 + fed.prompt_len
        assert torch.equal(fed.embeddings[row, start - len(prompt) : start], table[prompt])
        number = 0
        for slot, forced in enumerate(layout.forced[:-1]):
            if forced >= 0:
                wanted = table[backbone.tokens.newline]
            else:
                t = [0, 1 / 3, 2 / 3, 1][noise.levels[row, number]]
                clean = (codes[image_ids[row].flatten()[number]] - mean) / std
                wanted = ((1 - t) * clean + t * noise.eps[row, number]) * std + mean
                number += 1
            assert torch.allclose(fed.embeddings[row, start + slot], wanted, atol=1e-5)


def test_positions_count_from_each_rows_first_prompt_token(backbone, batch):
    layout, prompts, image_ids, noise = batch
    for given, num_side in ((None, 0), (noise, 3)):
        fed = trunk_input(backbone, prompts, image_ids, layout, given)
        for row, prompt in enumerate(prompts):
            padding = num_side + fed.prompt_len - len(prompt)
            wanted = [0] * padding + list(range(len(prompt) + layout.num_slots - 1))
            assert fed.position_ids[row].tolist() == wanted


def test_the_last_code_is_never_fed(backbone, batch):
    layout, prompts, image_ids, noise = batch
    other = image_ids.clone()
    other[:, -1, -1] = (other[:, -1, -1] + 1) % 7
    ours, theirs = (trunk_input(backbone, prompts, ids, layout, noise) for ids in (image_ids, other))
    assert torch.equal(ours.embeddings, theirs.embeddings)


def hidden_changes(backbone, batch, level: int) -> torch.Tensor:
    """(B, columns) whether the output of a column changes with the timestep token of a level."""
    layout, prompts, image_ids, noise = batch
    fed = trunk_input(backbone, prompts, image_ids, layout, noise)
    before = backbone(fed.embeddings, fed.position_ids, fed.attention_mask)
    embeddings = fed.embeddings.clone()
    rng = torch.Generator().manual_seed(1)
    embeddings[:, level - 1] += 3 * torch.randn(backbone.hidden_size, generator=rng)
    after = backbone(embeddings, fed.position_ids, fed.attention_mask)
    return (before - after).abs().amax(-1) > 1e-6


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_timestep_token_changes_only_slots_of_its_level(batch, level):
    """One layer, so that nothing is passed on: exactly the slots of that level, and the token itself."""
    layout, _, _, noise = batch
    backbone = tiny_chameleon(7, num_layers=1).requires_grad_(False)
    changed = hidden_changes(backbone, batch, level)
    num_slots = layout.num_slots - 1
    on_slots = torch.zeros(4, num_slots, dtype=torch.bool)
    on_slots[:, layout.code_slots[:-1]] = noise.levels[:, :-1] == level
    assert on_slots.any()
    assert torch.equal(changed[:, -num_slots:], on_slots)
    in_front = torch.arange(changed.shape[1] - num_slots) == level - 1
    assert torch.equal(changed[:, :-num_slots], in_front.expand(4, -1))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_through_layers_it_reaches_only_what_stands_behind_such_a_slot(backbone, batch, level):
    layout, _, _, noise = batch
    changed = hidden_changes(backbone, batch, level)[:, -(layout.num_slots - 1) :]
    at_level = torch.zeros_like(changed)
    at_level[:, layout.code_slots[:-1]] = noise.levels[:, :-1] == level
    behind = at_level.long().cumsum(1) > 0
    assert torch.equal(changed, behind)


def test_decoding_feeds_what_training_fed(backbone, batch):
    """The slow decoder's uncached forward on the same levels and noise gives training's logits."""
    layout, prompts, image_ids, noise = batch
    trained = code_logits(backbone, trunk_input(backbone, prompts, image_ids, layout, noise), layout)
    config = DecodingConfig("sjd2", window=99, num_levels=3)
    slot_ids = layout.slot_ids(image_ids)
    codes = backbone.slot_table()[:7]
    mean, std = codes.mean(0), codes.std(0, correction=0)
    for row, prompt in enumerate(RAGGED_PROMPTS):
        decoder = SlowDecoder(backbone, prompt, 0, config, layout)
        window, number = [], 0
        for slot, forced in enumerate(layout.forced):
            token, level, noisy = int(slot_ids[row, slot]), 0, torch.zeros(backbone.hidden_size)
            if forced < 0:
                level = int(noise.levels[row, number])
                t = level / 3
                noisy = (1 - t) * (codes[token] - mean) / std + t * noise.eps[row, number]
                number += 1
            window.append(Slot(token, level, noisy, np.zeros(7)))
        logits = decoder.logits(decoder.contexts[0], window)
        assert np.allclose(logits[layout.code_slots.numpy()], trained[row].numpy(), atol=1e-4)


def test_half_precision_trunks_keep_the_timestep_tokens(batch):
    """A checkpoint trained in single precision meets the same tokens when it decodes in half precision."""
    layout, _, image_ids, noise = batch
    noise = noise._replace(timesteps=timesteps(25))
    sides = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = tiny_chameleon(7, seed=2).to(dtype).requires_grad_(False)
        prompts = [backbone.prompt_ids(prompt, layout) for prompt in RAGGED_PROMPTS]
        sides.append(trunk_input(backbone, prompts, image_ids, layout, noise).embeddings[0, :25].float())
        config = DecodingConfig("sjd2", window=5, num_levels=25)
        method = Method(config, backbone.slot_table(), 7)
        sides.append(method.levels.timestep_tokens().float())
        assert decode(backbone, RAGGED_PROMPTS, range(4), config, layout).image_ids.shape == (4, 3, 2)
    for side in sides[1:]:
        assert torch.allclose(side, sides[0], atol=0.05)
