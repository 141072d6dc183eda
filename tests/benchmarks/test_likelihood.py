"""Nats a code against laws that are written out, and of images that the law itself draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.likelihood import nats_per_code
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from tests.tools.enumeration import sequence_law
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

SAMPLING = Sampling(guidance_scale=2.0, temperature=1.3)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), SAMPLING, replace(SAMPLING, guidance_schedule="linear")],
    ids=["plain", "guided", "linear"],
)
def test_nats_are_those_of_the_enumerated_law(sampling):
    backbone = tiny_chameleon(4, seed=3, scale=0.6)
    layout = backbone.layout(4, 4)
    images = torch.tensor([[[0, 3], [1, 2]], [[2, 2], [0, 1]], [[3, 3], [3, 3]], [[1, 0], [2, 0]]])
    found = nats_per_code(backbone, RAGGED_PROMPTS, images, layout, sampling)
    for row, (prompt, image) in enumerate(zip(RAGGED_PROMPTS, images, strict=True)):
        law = sequence_law(backbone, prompt, layout, sampling)
        number = int("".join(str(code) for code in image.flatten().tolist()), 4)
        assert float(found[row]) == pytest.approx(-np.log(law[number]) / 4, abs=1e-5)
    cut = replace(sampling, top_k=2, top_p=0.5)
    assert torch.allclose(nats_per_code(backbone, RAGGED_PROMPTS, images, layout, cut), found), "no cut"
    with pytest.raises(ValueError, match="greedy"):
        nats_per_code(backbone, RAGGED_PROMPTS, images, layout, replace(sampling, temperature=0.0))


def test_a_lossless_method_costs_what_autoregression_does_and_pure_denoising_more():
    backbone = tiny_chameleon(8, seed=3, scale=1.0)
    layout = backbone.layout(6, 6)
    methods = {
        "ar": DecodingConfig("ar", window=1),
        "exact": DecodingConfig("mc_sjd", 6, acceptance="exact"),
        "pure": DecodingConfig("sjd2_pure", 6, 2, acceptance="pure"),
    }
    nats = {}
    for name, config in methods.items():
        prompts = list(RAGGED_PROMPTS) * 100
        output = decode(backbone, prompts, range(400), replace(config, sampling=SAMPLING), layout)
        nats[name] = nats_per_code(backbone, prompts, output.image_ids, layout, SAMPLING)
    spread = float((nats["ar"].var() * 2 / 400).sqrt())
    assert abs(float(nats["exact"].mean() - nats["ar"].mean())) < 5 * spread
    assert float(nats["pure"].mean() - nats["ar"].mean()) > 5 * spread
