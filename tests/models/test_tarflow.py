"""A TarFlow is invertible, causal and a likelihood: against autograd's Jacobian and the loop."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from sjd2_lightning.fixed_point import Schedule, solve
from sjd2_lightning.models.tarflow import (
    BlockInverse,
    FlowBlock,
    FlowSizes,
    TarFlow,
    bits_per_dim,
    flow_loss,
    load_tarflow,
)

SIZES = FlowSizes(image_size=8, patch_size=2, width=16, num_blocks=3, head_width=8, text_width=5)
LOOP = Schedule(window=1)


def flow(scale: float = 0.3, **sizes) -> TarFlow:
    """A flow whose outputs are not zero, as they are at first."""
    torch.manual_seed(0)
    found = TarFlow(FlowSizes(**asdict(SIZES) | sizes)).eval()
    for block in found.blocks:
        nn.init.normal_(block.out.weight, std=scale / math.sqrt(16))
        nn.init.normal_(block.places)
    found.dropped_text.copy_(torch.randn(5))
    return found


def some(num: int = 2):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, 8, 8, generator=draw), torch.randn(num, 5, generator=draw)


def test_patches_are_pixels_again():
    pixels, _ = some()
    model = flow()
    assert model.patches(pixels).shape == (2, 16, 12)
    assert torch.equal(model.pixels(model.patches(pixels)), pixels)
    assert torch.equal(model.patches(pixels)[0, 5].view(3, 2, 2), pixels[0, :, 2:4, 2:4])


@pytest.mark.parametrize(
    "schedule", [LOOP, Schedule(), Schedule(segments=4), Schedule(window=5), Schedule(guess="zero")]
)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_every_inversion_gives_the_pixels_back(schedule, guidance):
    model, (pixels, text) = flow(), some()
    z, _ = model(pixels, text)
    found, solutions = model.invert(z, text, [schedule] * 3, guidance)
    loop, _ = model.invert(z, text, [LOOP] * 3, guidance)
    assert (found - loop).abs().amax() < 1e-4
    assert ((found - pixels).abs().amax() < 1e-4) == (guidance == 0), "guidance changes what is drawn"
    assert [int(solution.stats.num_generated[0]) for solution in solutions] == [15] * 3


def test_guidance_grows_from_nothing_to_its_whole_weight_at_the_last_patch():
    model, (_, text) = flow(), some()
    block, z, fed = model.blocks[0], torch.randn(2, 16, 12), torch.randn(2, 15, 12)
    found = BlockInverse(block, z, text, model.dropped_text, 1.5).values(0, fed)
    asked, bare = (block.scale_and_shift(0, fed, own) for own in (text, model.dropped_text.expand(2, -1)))
    for place in (0, 6, 14):  # of patches 1, 7 and 15
        weight = 1.5 * (place + 1) / 15
        scale, shift = (
            (1 + weight) * a[:, place] - weight * b[:, place] for a, b in zip(asked, bare, strict=True)
        )
        torch.testing.assert_close(
            found[:, place], z[:, place + 1] * scale.exp() + shift, rtol=1e-4, atol=1e-4
        )


def test_guesses_that_overflow_end_at_the_loops_values():
    model, (_, text) = flow(scale=6).double(), some()  # weights twenty times what they are elsewhere
    text, draw = text.double(), torch.Generator().manual_seed(3)
    z = torch.randn(2, 16, 12, generator=draw, dtype=torch.float64)
    inverses = [BlockInverse(model.blocks[0], z, text, model.dropped_text, 0.0) for _ in range(2)]
    wanted = solve(inverses[0], z, LOOP)
    wild = torch.cat([z[:, :1], torch.full_like(z[:, 1:], 1e14)], dim=1)
    wild[:, 3::4] = torch.inf
    found = solve(inverses[1], wild, Schedule(tolerance=0))
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-5, atol=1e-5)


def test_the_log_determinant_is_that_of_the_jacobian():
    model, (pixels, text) = flow(image_size=4), some(1)
    x = pixels[:, :, :4, :4]
    jacobian = torch.autograd.functional.jacobian(lambda p: model(p, text)[0], x).view(48, 48)
    _, wanted = torch.linalg.slogdet(jacobian.double())
    _, logdet = model(x, text)
    assert abs(48 * logdet.item() - wanted.item()) < 1e-3


def test_a_reversed_block_reads_the_places_of_patches_backwards():
    straight, backwards = FlowBlock(SIZES, False), FlowBlock(SIZES, True)
    nn.init.normal_(straight.out.weight)
    backwards.load_state_dict(straight.state_dict())
    backwards.places.data = straight.places.data.flip(0)
    x, text = torch.randn(2, 16, 12), torch.randn(2, 5)
    z, logdet = straight(x, text)
    mirrored, same = backwards(x.flip(1), text)
    torch.testing.assert_close(mirrored.flip(1), z)
    torch.testing.assert_close(same, logdet)


def test_parameters_depend_on_patches_to_the_left_alone():
    block = flow().blocks[0]
    x, text = torch.randn(1, 16, 12), torch.randn(1, 5)
    changed = x.clone()
    changed[:, 7] += 1
    before, after = (block.scale_and_shift(0, p[:, :-1], text)[0] for p in (x, changed))
    same = (before == after).all(-1)[0]
    assert same[:7].all()
    assert not same[7:].any()


def test_a_cache_of_single_patches_gives_the_parameters_of_one_pass():
    block = flow().blocks[1]
    x, text = torch.randn(2, 16, 12), torch.randn(2, 5)
    cache = block.new_cache(2)
    wanted, _ = block.scale_and_shift(0, x[:, :-1], text)
    parts = [
        block.scale_and_shift(a, x[:, a:b], text, cache)[0] for a, b in ((0, 1), (1, 2), (2, 9), (9, 15))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted)


def test_the_bits_of_a_new_flow_are_those_of_a_standard_normal():
    model, (pixels, text) = TarFlow(SIZES), some()
    bits = bits_per_dim(flow_loss(*model(pixels, text)))
    normal = -torch.distributions.Normal(0, 1).log_prob(pixels).mean()
    assert bits.item() == pytest.approx((normal.item() + math.log(128)) / math.log(2), abs=1e-4)


def test_noise_is_inside_its_grey_level_or_of_its_deviation():
    grey = torch.arange(192).view(1, 3, 8, 8) / 255
    uniform = flow(noise="uniform").noisy(grey, torch.Generator().manual_seed(0))
    assert torch.equal(((uniform + 1) * 128).floor(), (grey * 255).round())
    ends = flow(noise="uniform").noisy(torch.tensor([0.0, 1.0]).expand(1000, 3, 8, 2)[:10])
    assert ends.min() >= -1
    assert ends.max() < 1
    gaussian = flow(sigma=0.25).noisy(torch.full((50, 3, 8, 8), 0.5))
    assert gaussian.mean().item() == pytest.approx(0, abs=0.02)
    assert gaussian.std().item() == pytest.approx(0.25, abs=0.02)


def test_denoising_takes_a_step_of_sigma_squared_up_the_likelihood():
    model, (pixels, text) = TarFlow(FlowSizes(**asdict(SIZES) | {"sigma": 0.5})), some()
    torch.testing.assert_close(model.denoised(pixels, text), 0.75 * pixels)  # of a standard normal


def test_a_folder_is_read_back_and_what_is_none_is_refused(tmp_path):
    model, (pixels, text) = flow(), some()
    model.save(tmp_path)
    assert torch.equal(load_tarflow(tmp_path)(pixels, text)[0], model(pixels, text)[0])
    settings = json.loads((tmp_path / "flow.json").read_text())
    (tmp_path / "flow.json").write_text(json.dumps(settings | {"width": 32}))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "flow.json").write_text(json.dumps(settings))
    (tmp_path / "cut" / "flow.safetensors").write_bytes(b"cut off")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "cut"):
        with pytest.raises(ValueError, match=r"no flow in .*experiment=tarflow"):
            load_tarflow(folder)


def test_sizes_that_do_not_fit_are_named():
    assert FlowSizes(image_size=33).problems() == ["image_size=33: must be a multiple of patch_size=2"]
    assert FlowSizes(width=48).problems() == ["width=48: must be a multiple of head_width=32"]
    with pytest.raises(ValueError, match="head_width"):
        TarFlow(FlowSizes(width=48))
