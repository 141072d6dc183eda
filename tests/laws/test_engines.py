"""Engines: fixed shapes, layers that share what is compiled, a late host, buffers that are lent on."""

import json
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import TreeShape
from sjd2_lightning.decoding.engine import Engine
from sjd2_lightning.decoding.loop import Decoder, decoder_of
from sjd2_lightning.masks import Visible
from sjd2_lightning.models.attention import (
    DENSE,
    FLEX,
    flexible_attention,
    flexible_mask,
    packed_attention,
    packed_mask,
)
from tests.tools.tiny_backbones import RAGGED_PROMPTS, strong_table, tiny_chameleon

SAMPLING = Sampling(guidance_scale=2.0, top_k=5)
FAMILY_SIZES = {
    "chameleon": (32, 64),
    "emu3": (16, 16),
    "janus": (64, 64),
    "simple_ar": (48, 48),
    "glm_image": (64, 96),
    "llamagen": (64, 64),
}
METHODS = {
    "ar": DecodingConfig("ar", window=1, sampling=SAMPLING),
    "sjd2 replay": DecodingConfig("sjd2", window=6, num_levels=2, sampling=SAMPLING),
    "mc_sjd": DecodingConfig("mc_sjd", window=6, acceptance="exact", sampling=SAMPLING),
    "paper": DecodingConfig(
        "sjd2", window=6, num_levels=2, acceptance="paper", refiner="keep", sampling=SAMPLING
    ),
    "left": DecodingConfig("sjd", window=6, acceptance="exact", draft_init="repeat_left", sampling=SAMPLING),
    "sjd_pac": DecodingConfig(
        "sjd_pac", window=6, acceptance="exact", tree=TreeShape(4, 2, 2), sampling=SAMPLING
    ),
}
PROMPTS = ["p1", "p0 p2", "p0 p0 p3"]


def assert_same(output, wanted):
    assert torch.equal(output.slot_ids, wanted.slot_ids)
    assert torch.equal(output.stats.committed, wanted.stats.committed)


@pytest.fixture(scope="module")
def table():
    return strong_table(7, num_prompts=5)


@pytest.mark.parametrize("name", METHODS)
def test_shapes_come_from_few_numbers(table, name):
    """Without the compiler: what it would be given, and that the tokens do not depend on it."""
    layout, shapes = table.layout(5, 4), set()
    eager = decode(table, PROMPTS, range(3), METHODS[name], layout)

    def watched(embeddings, positions, mask, cache, noisy):
        shapes.add((len(embeddings), embeddings.shape[1], mask.shape[-1]))
        return table(embeddings, positions, mask, cache, noisy)

    with patch.object(torch, "compile", lambda *_, **__: watched):
        static = Decoder(table)(PROMPTS, range(3), replace(METHODS[name], engine="compiled"), layout)
    assert_same(static, eager)
    # one length of the pass and one of the cache: images of 256 columns share theirs
    assert len({shape[1:] for shape in shapes}) == 1


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_host_that_looks_late_changes_nothing(table, name, lag):
    """Passes that are started behind the end of an image commit nothing."""
    layout = table.layout(4, 4)
    wanted = decode(table, PROMPTS, range(3), METHODS[name], layout)
    with patch.object(Engine, "of", lambda config, device: Engine(False, False, False, lag, 1)):
        assert_same(decode(table, PROMPTS, range(3), METHODS[name], layout), wanted)


class OneByOne:
    """Stands for captured graphs where there is no GPU: counts what would be captured, and runs it."""

    def __init__(self):
        self.keys = []

    def run(self, num_rows, shape, iteration):
        self.keys.append((num_rows, shape))
        iteration(shape)


@pytest.mark.parametrize("name", METHODS)
def test_a_kept_batch_lends_its_buffers(table, name):
    """The second batch finds the buffers of the first, in place, and draws what a fresh one would."""
    layout, decoder = table.layout(4, 4), Decoder(table, num_kept=1)
    with (
        patch.object(Engine, "of", lambda config, device: Engine(False, False, True, 2, 64)),
        patch("sjd2_lightning.decoding.drawing.Graphs", OneByOne),
    ):
        decoder(PROMPTS, [5, 6, 7], METHODS[name], layout)
        [first] = decoder.kept.values()
        state, keys = first.buffers[0], first.context.cache.all_rows().keys[0]
        output = decoder(PROMPTS[::-1], range(3), METHODS[name], layout)
        [second] = decoder.kept.values()
        assert second is not first
        assert second.graphs is first.graphs, "graphs go on"
        assert second.buffers[0].tokens.data_ptr() == state.tokens.data_ptr()
        assert second.context.cache.all_rows().keys[0].data_ptr() == keys.data_ptr()
        assert len(set(second.graphs.keys)) <= 4, "by rows: 3, 2 and 1, and by no more"
        table.table.data.mul_(1.0)
        table.table.add_(0.0)  # an optimizer step
        decoder(PROMPTS, range(3), METHODS[name], layout)
        [third] = decoder.kept.values()
        assert third.graphs is not second.graphs, "of other weights nothing is kept"
    assert_same(output, decode(table, PROMPTS[::-1], range(3), METHODS[name], layout))


def test_rows_leave_at_sizes_that_have_graphs():
    engine = Engine(True, False, True, 2, 256)
    assert [engine.rows(num) for num in (1, 2, 3, 4, 5, 6, 7, 9, 13, 16)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 16]
    assert [engine._replace(captured=False).rows(num) for num in (1, 5, 7)] == [1, 5, 7]


def test_an_engine_that_the_device_cannot_run_is_named(table):
    with pytest.raises(ValueError, match=r"decoding.engine=graphs: .* the model is on cpu; use auto"):
        decode(table, ["p1"], [0], replace(METHODS["ar"], engine="graphs"), table.layout(2, 2))


def test_a_batch_that_does_not_fit_is_refused_with_its_size(table):
    with (
        patch("sjd2_lightning.decoding.drawing._free_bytes", lambda device: 10_000),
        patch.object(type(table), "forward", side_effect=AssertionError("a forward pass")),
        pytest.raises(ValueError, match=r"needs [\d.]+ GiB on cpu, and 0.0 GiB are free: take fewer prompts"),
    ):
        decode(table, PROMPTS, range(3), METHODS["sjd2 replay"], table.layout(4, 4))


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_one_shape_have_one_shape(table, name):
    """`window_shape`: every pass the same, and the tokens those of the method."""
    layout, shapes = table.layout(5, 4), set()
    config = replace(METHODS[name], window_shape=8)
    wanted = decode(table, PROMPTS, range(3), METHODS[name], layout)
    real = type(table).forward

    def watched(self, embeddings, positions, mask, cache, noisy=None):
        shapes.add((tuple(embeddings.shape), mask.shape[-1]))
        return real(self, embeddings, positions, mask, cache, noisy)

    with patch.object(type(table), "forward", watched):
        output = decode(table, PROMPTS, range(3), config, layout)
    if METHODS[name].acceptance in ("replay", "match"):
        assert torch.equal(output.slot_ids, wanted.slot_ids)
    assert (output.stats.committed <= METHODS[name].window).all()
    assert len(shapes) == 2, "the prompt, and every pass"


def test_methods_of_one_shape_share_it(table):
    """With levels or without: a shift of one column rounds otherwise in half precision."""
    layout, shapes = table.layout(5, 4), {}
    real = type(table).forward
    for name in ("ar", "sjd2 replay", "mc_sjd"):
        seen = shapes.setdefault(name, set())

        def watched(self, embeddings, positions, mask, cache, noisy=None, seen=seen):
            seen.add((tuple(embeddings.shape), mask.shape[-1]))
            return real(self, embeddings, positions, mask, cache, noisy)

        with patch.object(type(table), "forward", watched):
            decode(table, PROMPTS, range(3), replace(METHODS[name], window_shape=8), layout)
    assert shapes["ar"] == shapes["sjd2 replay"] == shapes["mc_sjd"]


def test_copies_of_a_backbone_make_their_own_decoder(table):
    import copy

    assert decoder_of(table) is decoder_of(table)
    assert copy.deepcopy(table).decoder is None


def compiled_beside_eager(name: str, attention: str = "dense") -> tuple[bool, int]:
    """Whether the tokens of both are equal, and the number of graphs that were compiled."""
    backbone = tiny_chameleon(num_codes=12, num_layers=3, hidden_size=32, seed=5, scale=0.5)
    layout, method = backbone.layout(8, 8), METHODS[name]
    eager = decode(backbone, RAGGED_PROMPTS, range(4), method, layout)
    counters.clear()
    way = replace(method, engine="compiled", attention=attention)
    compiled = decode(backbone, RAGGED_PROMPTS, range(4), way, layout)
    same = torch.equal(compiled.slot_ids, eager.slot_ids)
    return same, counters["stats"]["unique_graphs"]


def in_a_process(repo, *words: str) -> tuple[bool, int]:
    """`compiled_beside_eager` where types are not checked, since the compiler cannot read such functions."""
    words = (sys.executable, "-m", "tests.laws.test_engines", *words)
    ran = subprocess.run(words, cwd=repo, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiled_layers_give_the_same_tokens(repo, name):
    same, num_graphs = in_a_process(repo, name)
    assert same
    assert 0 < num_graphs <= 3, "layers share what is compiled"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ar", "sjd2 replay"])
def test_compiled_flex_attention_gives_the_same_tokens(repo, name):
    """On a CPU each size is compiled apart; on CUDA they share what is compiled."""
    assert in_a_process(repo, name, "flex")[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_layers_called_one_by_one_are_the_trunk(family, attention):
    """Without the compiler: the shared function, both attentions and the cache, in every family."""
    from sjd2_lightning.models.registry import build_shrunken

    backbone = build_shrunken(family)
    layout = backbone.layout(*FAMILY_SIZES[family])
    for name in ("ar", "sjd2 replay"):
        wanted = decode(backbone, ["a cat", "a red dog"], range(2), METHODS[name], layout)
        with (
            patch.object(torch, "compile", lambda function, **_: function),
            patch("sjd2_lightning.models.trunk.SMALLEST_HEAD", 1),
        ):
            layered = replace(METHODS[name], engine="compiled", attention=attention)
            decoder = Decoder(backbone)
            output = decoder(["a cat", "a red dog"], range(2), layered, layout)
        [trunk] = decoder.trunks.values()
        assert trunk.attention is {"dense": DENSE, "flex": FLEX}[attention]
        assert torch.equal(output.slot_ids, wanted.slot_ids)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [1, 5, 130])
@pytest.mark.parametrize("attention", [packed_attention, flexible_attention])
def test_shared_heads_attend_as_repeated_keys_do(attention, window):
    """Windows of one block of queries and of two, keys of three, with what each query sees drawn anew."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    num_columns = 300
    query, key, value = drawn(2, 8, window, 16), drawn(2, 2, num_columns, 16), drawn(2, 2, num_columns, 16)
    column = torch.arange(num_columns - window, num_columns).expand(2, -1)
    side = torch.randint(-1, 3, column.shape, generator=generator)
    before = column - torch.randint(0, 100, column.shape, generator=generator)
    visible = Visible(torch.tensor([3, 40]), before, before + 7, column, side)
    mask_of = {packed_attention: packed_mask, flexible_attention: flexible_mask}[attention]
    mask = mask_of(visible, num_columns, query.dtype, 4)
    with patch.object(torch, "compile", lambda function, **_: function):
        found, _ = attention(torch.nn.Identity(), query, key, value, mask, 0.3)
    repeated = (each.repeat_interleave(4, dim=1) for each in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=visible.dense(num_columns), scale=0.3
    )
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-5)


def test_which_engine_attends_without_a_mask():
    """FlexAttention on CUDA, if not told otherwise; refused where layers are not compiled."""
    ar, cuda, cpu = METHODS["ar"], torch.device("cuda"), torch.device("cpu")
    assert Engine.of(ar, cuda).flex
    assert not Engine.of(replace(ar, attention="dense"), cuda).flex
    assert not Engine.of(replace(ar, engine="compiled"), cpu).flex
    assert Engine.of(replace(ar, engine="compiled", attention="flex"), cpu).flex
    assert not Engine.of(replace(ar, invariant=True), cuda).flex
    for refused in ({"engine": "eager"}, {"engine": "compiled", "invariant": True}):
        with pytest.raises(ValueError, match=r"decoding\.attention=flex: only compiled layers .* use auto"):
            Engine.of(replace(ar, attention="flex", **refused), cpu)


if __name__ == "__main__":
    print(json.dumps(compiled_beside_eager(*sys.argv[1:])))
