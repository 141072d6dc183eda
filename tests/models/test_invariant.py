"""A token's numbers are the same bits whatever else a pass computes; plain layers are the control."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from sjd2_lightning.masks import Visible, additive
from sjd2_lightning.models import invariant
from sjd2_lightning.models.chameleon import load_chameleon
from sjd2_lightning.models.registry import FAMILIES, build_shrunken
from sjd2_lightning.models.small import shrunken_chameleon
from sjd2_lightning.models.trunk import cache_argument
from tests.tools.source import REPO

DTYPES = (torch.float32, torch.bfloat16)
SPANS = ((0, 1), (3, 4), (66, 68), (5, 37), (1, 70))


def clean(columns, first):
    """`Visible` of clean tokens in columns (B, L), causal from each row's first column on."""
    return Visible(first, columns + 1, columns, columns, torch.full_like(columns, -1))


def hidden_states(trunk, layers, embeddings, columns, first, cache, num_visible, plain=False):
    """(B, L, D) what layers make of embeddings (B, L, D) in columns (B, L), and the last norm of it."""
    cache.place(columns, num_visible)
    places = trunk.rotary_emb(embeddings, (columns - first[:, None]).clamp_min(0))
    visible = clean(columns, first)
    mask = additive(visible.dense(num_visible), embeddings.dtype) if plain else visible
    x = embeddings
    for layer in layers[:-1]:
        out = layer(x, attention_mask=mask, position_embeddings=places, **{cache_argument(layer): cache})
        x = out[0] if isinstance(out, tuple) else out
    return layers[-1](x)


def differing_tokens(backbone, plain):
    """How many of 32 tokens differ from their own one-token pass: alone, in windows, in a batch of three."""
    trunk = backbone.trunk
    parts = [*trunk.layers, trunk.norm]
    layers = parts if plain else [invariant.invariant_copy(part) for part in parts]
    run = partial(hidden_states, trunk, layers, plain=plain)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(backbone.slot_table()), (3, 90), generator=generator)
    embeddings = backbone.slot_table()[tokens]
    start, end, shift = 40, 72, torch.tensor([0, 5, 9])
    # one token a pass, row 1 alone: its first column is 0
    zero, cache = torch.zeros(1, dtype=torch.long), backbone.new_cache(1, 90)
    own = embeddings[1:2]
    run(own[:, :start], torch.arange(start)[None], zero, cache, start)
    singles = [
        run(own[:, t : t + 1], torch.tensor([[t]]), zero, cache, t + 1)[0, 0] for t in range(start, end)
    ]
    wanted = torch.stack(singles)
    different = torch.zeros(end - start, dtype=torch.bool)
    for first_token in (start, start - 9):  # each token in two places of a window of 32
        # three rows, each right of other padding; more columns than are filled
        cache = backbone.new_cache(3, 400)
        padded = torch.stack([row.roll(int(by), 0) for row, by in zip(embeddings, shift, strict=True)])
        begin = first_token + 5
        run(padded[:, :begin], torch.arange(begin).expand(3, -1), shift, cache, begin)
        columns = torch.arange(begin, begin + 32).expand(3, -1)
        found = run(padded[:, begin : begin + 32], columns, shift, cache, 400)[1]
        common = found[start - first_token :]
        different[: len(common)] |= (common != wanted[: len(common)]).any(-1)
    return int(different.sum())


@torch.inference_mode()
def test_a_token_of_the_miniature_is_the_same_alone_and_in_a_window(tiny_weights):
    backbone = load_chameleon(tiny_weights).to(torch.bfloat16).eval()
    assert differing_tokens(backbone, plain=False) == 0
    assert differing_tokens(backbone, plain=True) > 0, "plain layers pass: the test would show nothing"


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_does_not_see_other_rows(dtype):
    torch.manual_seed(0)
    for depth, columns in ((192, 512), (37, 53)):
        x, weight = torch.randn(70, depth).to(dtype), torch.randn(columns, depth).to(dtype)
        bias = torch.randn(columns).to(dtype)
        full = invariant.linear(x, weight, bias)
        wanted = F.linear(x.double(), weight.double(), bias.double())
        assert torch.allclose(full.double(), wanted, atol=1e-4 if dtype == torch.float32 else 0.3, rtol=1e-2)
        assert all(torch.equal(invariant.linear(x[a:b], weight, bias), full[a:b]) for a, b in SPANS)
        assert torch.equal(invariant.linear(x.view(7, 10, -1), weight, bias).view(70, -1), full)
    if dtype == torch.float32:
        assert not all(torch.equal(F.linear(x[a:b], weight), F.linear(x, weight)[a:b]) for a, b in SPANS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_do_not_see_other_rows(dtype):
    torch.manual_seed(0)
    for width in (37, 192, 4096):
        x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((70, width), (width,), (width,)))
        wide = [part.double() for part in (x, weight, bias)]
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
        root = partial(invariant.rms_norm, weight=weight, eps=1e-5)
        layer = partial(invariant.layer_norm, weight=weight, bias=bias, eps=1e-5)
        assert torch.allclose(root(x).double(), F.rms_norm(wide[0], (width,), wide[1], 1e-5), **close)
        assert torch.allclose(layer(x).double(), F.layer_norm(wide[0], (width,), *wide[1:], 1e-5), **close)
        for norm in (root, layer):
            assert all(torch.equal(norm(x[a:b]), norm(x)[a:b]) for a, b in SPANS)


def test_activations_do_not_see_other_rows():
    """Torch's SiLU rounds otherwise at the end of a tensor; 37 numbers a row make every row's end another."""
    torch.manual_seed(0)
    x = torch.randn(70, 37)
    own = invariant._Elementwise(nn.SiLU())
    assert all(torch.equal(own(x[a:b]), own(x)[a:b]) for a, b in SPANS)
    assert not all(torch.equal(F.silu(x[a:b]), F.silu(x)[a:b]) for a, b in SPANS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_sees_only_what_is_visible(dtype):
    """Timestep tokens, a branch, grouped heads, strided keys; alone, with fewer and more columns, moved."""
    torch.manual_seed(0)
    batch, heads, key_heads, length, columns, size = 2, 4, 2, 5, 300, 24
    query = torch.randn(batch, heads, length, size).to(dtype)
    keys, values = (torch.randn(batch, columns, key_heads, size).to(dtype).transpose(1, 2) for _ in "kv")
    bounds = torch.tensor([[271, 272, 273, 260, 260], [270, 271, 272, 272, 273], [270, 271, 272, 273, 274]])
    before, own_from, column = (bound.expand(batch, -1) for bound in bounds)
    side = torch.tensor([-1, 0, 1, -1, 2]).expand(batch, -1)
    visible, scale = Visible(torch.tensor([3, 8]), before, own_from, column, side), size**-0.5
    full = invariant.attention(query, keys, values, visible, scale)
    wide = [part.double() for part in (query, keys, values)]
    wanted = F.scaled_dot_product_attention(*wide, visible.dense(columns), scale=scale, enable_gqa=True)
    assert torch.allclose(full.double(), wanted, atol=1e-5 if dtype == torch.float32 else 5e-3)
    for place in range(length):
        one = Visible(visible.first[1:], *(bound[1:, place : place + 1] for bound in visible[1:]))
        later = Visible(*(bound + 40 for bound in one[:4]), one.side)
        own, held = query[1:, :, place : place + 1], (keys[1:], values[1:])
        alike = {
            "alone": (held, one),
            "fewer columns": ([part[:, :, :275] for part in held], one),
            "more columns": ([F.pad(part, (0, 0, 0, 300), value=9.0) for part in held], one),
            "moved": (
                [torch.cat([part[:, :, :3], part[:, :, :40], part[:, :, 3:]], 2) for part in held],
                later,
            ),
        }
        for name, (given, seen) in alike.items():
            found = invariant.attention(own, *given, seen, scale)
            assert torch.equal(found[0, :, 0], full[1, :, place]), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_copy_is_the_layer_in_other_arithmetic(family):
    backbone = build_shrunken(family)
    trunk = backbone.trunk
    for parameter in trunk.layers.parameters():  # biases of norms are zero in a new model
        parameter.add_(torch.rand_like(parameter), alpha=0.1)
    first, columns = torch.tensor([0, 2]), torch.arange(7).expand(2, -1)
    x = torch.randn(2, 7, backbone.hidden_size)
    places = trunk.rotary_emb(x, (columns - first[:, None]).clamp_min(0))
    visible = clean(columns, first)
    template = invariant.invariant_copy(trunk.layers[0])
    assert template.state_dict().keys() == trunk.layers[0].state_dict().keys()
    assert trunk.layers[0].self_attn.config._attn_implementation == "sdpa", "the model itself is changed"
    for layer in trunk.layers:  # one template with the parameters of each layer
        wanted = layer(x, attention_mask=additive(visible.dense(7), x.dtype), position_embeddings=places)
        arguments = {"attention_mask": visible, "position_embeddings": places}
        found = functional_call(template, dict(layer.named_parameters()), (x,), arguments)
        wanted, found = (out[0] if isinstance(out, tuple) else out for out in (wanted, found))
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.equal(found, x)


def test_what_cannot_be_invariant_is_refused():
    layer = shrunken_chameleon().trunk.layers[0]
    layer.mlp.gate_proj = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"no invariant arithmetic for mlp\.gate_proj, a Bilinear"):
        invariant.invariant_copy(layer)
    layer = invariant.invariant_copy(shrunken_chameleon().trunk.layers[0])
    x = torch.randn(1, 1, 16)
    places = (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
    with pytest.raises(ValueError, match="attention_mask is a Tensor; invariant layers take"):
        layer(x, attention_mask=torch.zeros(1, 1, 1, 1), position_embeddings=places)
    assert invariant.problems(256, torch.device("cpu")) == []
    assert invariant.problems(128, torch.device("cuda")) == []
    (found,) = invariant.problems(256, torch.device("cuda"))
    assert found.startswith("decoding.invariant=true: heads of size 256")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(dtype):
    """Against float64, and bit for bit against themselves with other rows, places and numbers of columns."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.tools.interpreted_kernels", dtype]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(results) >= 6
    assert not [result["check"] for result in results if not result["equal"]]
    # of the largest value; the interpreter truncates to bfloat16
    limit = {"float32": 2e-6, "bfloat16": 1e-2}[dtype]
    assert not [r for r in results if r["error"] > limit]


def test_the_head_of_a_token_is_the_same_in_any_company():
    """In float32, where torch takes another kernel for a few rows than for many."""
    backbone = load_chameleon(REPO / "weights/tiny").eval()
    hidden = torch.randn(33, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    trunk = backbone.decoding_trunk(compiled=False, invariant=True)
    with torch.inference_mode():
        alone = torch.cat([trunk.head(row[None]) for row in hidden])
        assert torch.equal(trunk.head(hidden), alone)
        plain = torch.cat([backbone.image_logits(row[None]) for row in hidden])
        assert not torch.equal(backbone.image_logits(hidden), plain), "negative control"
