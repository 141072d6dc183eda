"""Replay on the shipped weights: every token of every method is the one that autoregression draws.

Where the two best perturbed scores of a slot lie within 1e-5, rounding may decide: such near ties are
counted and recorded with the test, and the image is compared up to the first of them.

Autoregression is decoded once for each guidance scale, in large batches, and kept for all tests and workers:
that an image does not depend on its batch is tested in test_replay.py.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

from benchmarks.shipped import shipped_pixels, shipped_prompts
from sjd2_lightning.decoding import DecodingConfig, NearTies, Sampling, decode, decode_reference
from sjd2_lightning.models.registry import load_backbone

METHODS = {
    "sjd": DecodingConfig("sjd", window=32),
    "sjd2, one level": DecodingConfig("sjd2", window=16, num_levels=1),
    "sjd2, four levels": DecodingConfig("sjd2", window=32, num_levels=4, draft_init="gumbel"),
}
SAMPLINGS = {"guidance off": Sampling(), "guidance 3": Sampling(guidance_scale=3.0, top_k=100)}
PART = 32  # images whose autoregression is decoded together; two parts make the 64 of the slow tests
AR = DecodingConfig("ar", window=1)


@pytest.fixture(scope="module")
def shipped(tiny_weights):
    """The shipped backbone and captions of held-out images, of unequal length."""
    if not (tiny_weights / "backbone.json").is_file():
        pytest.skip("no weights in weights/tiny: train them with `python train.py experiment=tiny_base`")
    captions = sorted({item.prompt for item in shipped_prompts(64)})
    return load_backbone("chameleon", tiny_weights), captions


def autoregression(backbone, prompts, seeds, sampling, layout) -> tuple[torch.Tensor, list[int]]:
    """Slot ids (B, N), and for each image the first slot that rounding may decide, or N."""
    ties = NearTies()
    output = decode(backbone, prompts, seeds, replace(AR, sampling=sampling), layout, ties)
    ends = [
        min((slot for image, slot in ties.slots if image == row), default=layout.num_slots)
        for row in range(len(prompts))
    ]
    return output.slot_ids, ends


@pytest.fixture(scope="module")
def kept_autoregression(shipped, tmp_path_factory):
    """`autoregression` of a part of 64 images, from a file that the workers of xdist share."""
    backbone, captions = shipped
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def found(sampling: str, part: int) -> tuple[list[str], range, torch.Tensor, list[int]]:
        seeds = range(part * PART, (part + 1) * PART)
        prompts = [captions[seed % len(captions)] for seed in seeds]
        path = folder / f"ar {sampling} {part}.pt"
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                layout = backbone.layout(shipped_pixels(), shipped_pixels())
                torch.save(autoregression(backbone, prompts, seeds, SAMPLINGS[sampling], layout), path)
            return prompts, seeds, *torch.load(path, weights_only=True)

    return found


def assert_replayed(
    backbone,
    config: DecodingConfig,
    layout,
    prompts: Sequence[str],
    seeds: Sequence[int],
    wanted: torch.Tensor,
    ends: Sequence[int],
    batch_size: int,
) -> None:
    """Decodes in batches of `batch_size`; every image equals the wanted one up to its end."""
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        output = decode(backbone, prompts[part], seeds[part], config, layout)
        assert output.stats.step_compression.mean() > 1
        for ours, theirs, end, prompt in zip(
            output.slot_ids, wanted[part], ends[part], prompts[part], strict=True
        ):
            assert torch.equal(ours[:end], theirs[:end]), prompt


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_some_small_images_in_a_ragged_batch(shipped, sampling):
    backbone, captions = shipped
    prompts = captions[:: len(captions) // 4][:4]
    layout = backbone.layout(32, 32)
    assert len({len(backbone.prompt_ids(prompt, layout)) for prompt in prompts}) > 1, "not ragged"
    wanted, ends = autoregression(backbone, prompts, range(4), SAMPLINGS[sampling], layout)
    assert sum(end < layout.num_slots for end in ends) <= 2
    for config in METHODS.values():
        config = replace(config, sampling=SAMPLINGS[sampling])
        assert_replayed(backbone, config, layout, prompts, range(4), wanted, ends, 4)


def test_one_whole_image_alone(shipped):
    backbone, captions = shipped
    layout = backbone.layout(shipped_pixels(), shipped_pixels())
    wanted, ends = autoregression(backbone, captions[7:8], range(1), Sampling(), layout)
    config = METHODS["sjd2, one level"]
    assert_replayed(backbone, config, layout, captions[7:8], range(1), wanted, ends, 1)


def test_the_reference_agrees(shipped):
    backbone, captions = shipped
    layout = backbone.layout(shipped_pixels(), shipped_pixels())
    sampling = SAMPLINGS["guidance 3"]
    config = DecodingConfig("sjd2", window=8, num_levels=1, sampling=sampling)
    fast = decode(backbone, captions[:1], [3], config, layout).slot_ids[0, :40]
    assert torch.equal(fast, decode_reference(backbone, captions[0], 3, sampling, layout, num_slots=40))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sixty_four_images(shipped, kept_autoregression, sampling, part, method, batch_size, record_property):
    backbone, _ = shipped
    layout = backbone.layout(shipped_pixels(), shipped_pixels())
    prompts, seeds, wanted, ends = kept_autoregression(sampling, part)
    num_cut = sum(end < layout.num_slots for end in ends)
    record_property("images_with_a_near_tie", num_cut)
    assert num_cut <= PART // 4, "the tolerance hides more than rounding"
    config = replace(METHODS[method], sampling=SAMPLINGS[sampling])
    assert_replayed(backbone, config, layout, prompts, seeds, wanted, ends, batch_size)
