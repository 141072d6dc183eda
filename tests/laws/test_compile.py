"""`compile`: the trunk sees the same shapes in every pass, and the tokens are those of the eager run."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import TreeShape
from tests.tools.tiny_backbones import RAGGED_PROMPTS, strong_table, tiny_chameleon

SAMPLING = Sampling(guidance_scale=2.0, top_k=5)
METHODS = {
    "ar": DecodingConfig("ar", window=1, sampling=SAMPLING),
    "sjd2 replay": DecodingConfig("sjd2", window=6, num_levels=2, sampling=SAMPLING),
    "mc_sjd": DecodingConfig("mc_sjd", window=6, acceptance="exact", sampling=SAMPLING),
    "sjd_pac": DecodingConfig(
        "sjd_pac", window=6, acceptance="exact", tree=TreeShape(4, 2, 2), sampling=SAMPLING
    ),
}


def test_shapes_stay_the_same():
    """Without the compiler: what it would be given, and that the tokens do not depend on it."""
    backbone = strong_table(7, num_prompts=5)
    layout = backbone.layout(5, 4)
    prompts = ["p1", "p0 p2", "p0 p0 p3"]
    for config in METHODS.values():
        eager = decode(backbone, prompts, range(3), config, layout)
        shapes = set()

        def watched(trunk, shapes=shapes):
            def forward(embeddings, positions, mask, cache):
                shapes.add((len(embeddings), embeddings.shape[1], mask.shape[1:]))
                return trunk(embeddings, positions, mask, cache)

            return forward

        with patch.object(torch, "compile", watched):
            static = decode(backbone, prompts, range(3), replace(config, engine="compiled"), layout)
        assert torch.equal(static.slot_ids, eager.slot_ids)
        assert torch.equal(static.stats.committed, eager.stats.committed)
        assert len({shape[1:] for shape in shapes}) == 1, "length of the pass and of the mask"
        assert len(shapes) <= 3, "a batch shrinks when rows leave, and only then"


@pytest.mark.parametrize("name", METHODS)
def test_compiled_lookup_gives_the_same_tokens(name):
    """Through the real compiler: cache, guards and index writes, on a trunk that is a table."""
    backbone = strong_table(7, num_prompts=5)
    layout = backbone.layout(4, 4)
    prompts = ["p1", "p0 p2"]
    eager = decode(backbone, prompts, range(2), METHODS[name], layout)
    compiled = decode(backbone, prompts, range(2), replace(METHODS[name], engine="compiled"), layout)
    assert torch.equal(compiled.slot_ids, eager.slot_ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiled_trunk_gives_the_same_tokens(name):
    backbone = tiny_chameleon(num_codes=12, hidden_size=16, seed=5, scale=0.5)
    layout = backbone.layout(8, 8)
    eager = decode(backbone, RAGGED_PROMPTS, range(4), METHODS[name], layout)
    compiled = decode(backbone, RAGGED_PROMPTS, range(4), replace(METHODS[name], engine="compiled"), layout)
    assert torch.equal(compiled.slot_ids, eager.slot_ids)
