"""The normalised space: round trip, moments, nearest codes and timestep tokens."""

import math

import pytest
import torch

from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.noise import timesteps
from tests.tools.tiny_backbones import tiny_chameleon


@pytest.fixture(params=["random", "trunk"])
def table(request):
    if request.param == "trunk":
        return tiny_chameleon(8).slot_table()[:8].detach()
    rng = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=rng) * torch.tensor([1, 2, 3, 0.1, 0.01, 5]) + 3


def test_the_table_is_standard_in_the_space(table):
    rows = EmbeddingSpace(table).normalise(table)
    assert torch.allclose(rows.mean(0), torch.zeros(table.shape[1]), atol=1e-4)
    assert torch.allclose(rows.pow(2).mean(0), torch.ones(table.shape[1]), atol=1e-4)


def test_round_trip(table):
    space = EmbeddingSpace(table)
    assert torch.allclose(space.denormalise(space.normalise(table)), table, atol=1e-5)
    assert torch.allclose(space.denormalise(torch.zeros(1, table.shape[1])), table.mean(0)[None], atol=1e-5)


def test_a_constant_dimension_does_no_harm():
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    table[:, 2] = 7.0
    space = EmbeddingSpace(table)
    assert torch.isfinite(space.normalise(table)).all()
    assert torch.allclose(space.denormalise(torch.randn(5, 4))[:, 2], torch.tensor(7.0), atol=1e-4)


def test_nearest_codes_are_by_cosine(table):
    space = EmbeddingSpace(table)
    queries = torch.randn(3, 7, table.shape[1], generator=torch.Generator().manual_seed(1))
    rows = ((table - table.mean(0)) / table.std(0, correction=0)).tolist()

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    found = space.nearest_ids(queries)
    for query, code in zip(queries.flatten(0, 1).tolist(), found.flatten().tolist(), strict=True):
        assert code == max(range(len(rows)), key=lambda k: cosine(rows[k], query))
    assert found.shape == (3, 7)
    assert torch.equal(space.nearest_ids(3 * space.normalise(table)), torch.arange(len(table)))


def test_timestep_tokens_look_like_embeddings_and_differ(table):
    space = EmbeddingSpace(table)
    tokens = space.timestep_tokens(timesteps(25)[1:])
    assert tokens.shape == (25, table.shape[1])
    rows = space.normalise(tokens)
    assert torch.allclose(rows.mean(1), torch.zeros(25), atol=1e-4)
    assert torch.allclose(rows.pow(2).mean(1), torch.ones(25), atol=1e-2)
    assert torch.pdist(rows).min() > 1e-2


def test_a_timestep_token_depends_on_t_alone():
    space = EmbeddingSpace(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)))
    coarse, fine = space.timestep_tokens(timesteps(2)), space.timestep_tokens(timesteps(4))
    assert torch.equal(coarse, fine[::2])
    assert space.timestep_tokens(torch.zeros(0)).shape == (0, 5)
