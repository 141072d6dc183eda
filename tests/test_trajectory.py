"""On-policy states of training are those that the decoder goes through."""

from unittest.mock import patch

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.decoding.randomness import Purpose, gumbel, normal, slot_keys, stream
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.module import NoiseConfig, SJD2Module
from sjd2_lightning.noise import RampLaw, timesteps
from sjd2_lightning.optimizer import OptimizerConfig
from sjd2_lightning.sequence import NoisyCodes
from sjd2_lightning.tied import tied_noise
from sjd2_lightning.trajectory import decoding_states
from tests.test_module import CAPTIONS, batch_of, train
from tests.tiny_backbones import tiny_chameleon

SEED = 5


def module_of(**noise) -> SJD2Module:
    backbone = tiny_chameleon(7, seed=4, scale=0.6).eval()
    ramp = RampLaw(clean_run=(1, 2), segment=(1, 2), top_run=(0, 2))
    config = NoiseConfig(num_levels=(3, 3), ramp=ramp, **noise)
    return SJD2Module(backbone, config, OptimizerConfig(), image_size=(6, 6), val_levels=2)


@pytest.mark.parametrize("path", ["flow", "drafts"])
@pytest.mark.parametrize("tied", [False, True])
def test_first_step_of_a_whole_window_is_the_decoders(path, tied):
    module = module_of()
    backbone, layout = module.backbone, module.image_layout
    states = []
    renew = Window.renew

    def spy(window, *args):
        renew(window, *args)
        if not states:
            states.append(window.strip["noisy"][:, : layout.num_slots].clone())

    config = DecodingConfig("sjd2", layout.num_slots + 1, num_levels=3, path=path, tied=tied)
    with patch.object(Window, "renew", spy):
        decode(backbone, CAPTIONS[:1], [SEED], config, layout)
    slots = layout.code_slots
    keys = slot_keys(torch.tensor([[SEED]]), slots)
    table = backbone.slot_table()[: backbone.num_codes].detach()
    normalised = EmbeddingSpace(table).normalise(table)
    noise = gumbel(stream(keys, Purpose.GUMBEL), backbone.num_codes)
    eps = normal(stream(keys, Purpose.NOISE), table.shape[1])
    eps = tied_noise(noise, normalised) if tied else eps
    codes = NoisyCodes(torch.full((1, len(slots)), 2), timesteps(3), eps)
    batch = batch_of()._replace(captions=CAPTIONS[:1], image_ids=batch_of().image_ids[:1])
    prompts = module._prompts(batch.captions, None)
    with torch.no_grad():
        ours = decoding_states(
            codes, noise, normalised, path, lambda codes: module._logits(batch, prompts, codes)
        )
    assert torch.allclose(ours, states[0][:, slots], atol=1e-4)
    assert not torch.allclose(ours, eps, atol=0.1)


def test_slots_take_as_many_steps_as_their_levels_tell():
    """By hand: a slot of the top level is its noise; one below has taken one step, when all were noise."""
    module, batch = module_of(), batch_of()
    table = module.backbone.slot_table()[:7].detach()
    normalised = EmbeddingSpace(table).normalise(table)
    rng = torch.Generator().manual_seed(0)
    eps, noise = torch.randn(4, 9, table.shape[1], generator=rng), torch.randn(4, 9, 7, generator=rng)
    levels = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 3]]).expand(4, -1)
    prompts, seen = module._prompts(batch.captions, None), []

    def logits_of(codes):
        seen.append(codes.levels[0].tolist())
        return module._logits(batch, prompts, codes)

    with torch.no_grad():
        states = decoding_states(NoisyCodes(levels, timesteps(3), eps), noise, normalised, "flow", logits_of)
        first = module._logits(batch, prompts, NoisyCodes(levels.clamp(0, 1) * 3, timesteps(3), eps, eps))
    assert seen == [[0, 0, 3, 3, 3, 3, 3, 3, 3], [0, 0, 2, 2, 2, 2, 3, 3, 3]]
    assert torch.equal(states[:, 6:], eps[:, 6:])
    x0_hat = normalised[(first.log_softmax(-1) + noise).argmax(-1)]
    wanted = (2 / 3 * eps + 1 / 3 * x0_hat)[:, 4:6]
    assert torch.allclose(states[:, 4:6], wanted, atol=1e-6)


def test_the_image_is_the_fixed_point_of_its_posterior_noise():
    module, batch = module_of(tied=True, on_policy=True), batch_of()
    prompts = module._prompts(batch.captions, None)
    levels = torch.zeros(4, 9, dtype=torch.long)
    levels[:, 4:] = 2
    seen = {}

    def spy(noise, gumbel, *others):
        seen["gumbel"] = gumbel
        return decoding_states(noise, gumbel, *others)

    with patch("sjd2_lightning.module.decoding_states", spy):
        noise = module._noisy(batch, prompts, levels, timesteps(2), torch.Generator().manual_seed(1))
    with torch.no_grad():
        law = module._logits(batch, prompts, None).log_softmax(-1)
    assert torch.equal((law + seen["gumbel"]).argmax(-1), batch.image_ids.flatten(1))
    assert not noise.states.requires_grad


@pytest.mark.parametrize(
    "noise",
    [{"tied": True}, {"on_policy": True}, {"on_policy": True, "path": "drafts"}, {"continuous": True}],
)
def test_every_kind_of_noise_trains(noise):
    trainer = train(module_of(**noise), 3)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert torch.isfinite(trainer.callback_metrics["val/loss_high"])


def test_the_random_grid_is_a_grid():
    rng = torch.Generator().manual_seed(0)
    noise = NoiseConfig(continuous=True)
    for num_levels in (1, 2, 8):
        grid = noise.grid(num_levels, rng)
        assert len(grid) == num_levels + 1
        assert (grid[0], grid[-1]) == (0, 1)
        assert (grid.diff() > 0).all()
    assert torch.equal(noise.grid(4, None), timesteps(4))
    assert not torch.equal(noise.grid(4, rng), noise.grid(4, rng))


def test_values_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"set noise\.on_policy to true"):
        NoiseConfig(path="drafts")
    with pytest.raises(ValueError, match=r"noise\.path must be one of flow, drafts; got 'x'"):
        NoiseConfig(path="x")
