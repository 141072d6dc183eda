"""FlexAttention in training: the columns that a dense mask shows, the same losses and gradients."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sjd2_lightning.masks import Visible, additive
from sjd2_lightning.models import attention
from sjd2_lightning.models.attention import blocks_of
from sjd2_lightning.models.registry import build_shrunken
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.optimizer import OptimizerConfig
from sjd2_lightning.training.speed import picture_flops
from tests.models.test_recompute import module_of, step
from tests.training.test_module import NOISE, batch_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),  # no trainer here
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def sequences(length: int) -> Visible:
    """Three rows: without padding, with a little, and with more than a block; levels up to four."""
    columns = torch.arange(length).expand(3, -1)
    first = torch.tensor([4, 9, 200])
    levels = torch.randint(5, (3, length), generator=torch.Generator().manual_seed(0))
    levels = torch.where(columns < first[:, None], 0, levels)
    return Visible.of_prompt(columns, first)._replace(side=levels - 1)


@pytest.mark.parametrize("length", [384, 411])
def test_blocks_show_what_the_dense_mask_shows(length):
    visible = sequences(length)
    blocks = blocks_of(visible)
    rows, places = torch.arange(3)[:, None, None], torch.arange(length)
    seen = blocks.mask_mod(rows, 0, places[None, :, None], places[None, None])
    number = places // 16
    num = len(number.unique())
    parts, whole = torch.zeros(2, 3, num, num, dtype=torch.bool)
    for chosen, counts, lists in (
        (parts, blocks.kv_num_blocks, blocks.kv_indices),
        (whole, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for row in range(3):
            for query in range(num):
                chosen[row, query, lists[row, 0, query, : counts[row, 0, query]].long()] = True
    assert not (parts & whole).any()
    assert whole.any()
    grids = [kind[:, number][:, :, number] for kind in (parts, whole)]
    found = (grids[0] & seen) | grids[1]
    assert torch.equal(found[:, None], visible.dense(length))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """FlexAttention refuses gradients on a CPU, where only its plain, slow arithmetic has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "_BLOCK", 16)  # several blocks to a short sequence


def flexible(lora: bool, kind: str, backend) -> SJD2Module:
    module = module_of(lora, kind, backend)
    module.backbone.attend_flexibly()
    return module


@pytest.fixture
def unchecked():
    """Inside a checkpoint the compiler does not know what the checks of shapes note."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize(
    ("kind", "backend"), [("none", None), ("full", None), ("selective", None), ("full", "aot_eager")]
)
def test_losses_and_gradients_are_those_under_a_dense_mask(lora, kind, backend, unchecked, monkeypatch):
    used = []
    flex = attention.flexible_attention
    if backend is None:
        monkeypatch.setattr(attention, "flexible_attention", lambda *given: used.append(1) or flex(*given))
    wanted = step(module_of(lora))
    assert not used
    found = step(flexible(lora, kind, backend))
    assert backend or used
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


def test_autocast_leaves_queries_and_keys_in_one_type_with_values():
    wanted, module = module_of(False), flexible(False, "none", None)
    losses = []
    for one in (wanted, module):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(float(one.training_step(batch_of(), 0).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(("family", "side"), [("emu3", 32), ("simple_ar", 32), ("janus", 64)])
def test_heads_that_share_keys_and_a_walk_of_trajectories(family, side):
    """Emu3 has fewer heads of keys than of queries; trajectories take several passes."""
    noise = replace(NOISE, process=replace(NOISE.process, source="mean", state="draft"), trajectory=True)
    found = []
    for flex in (False, True):
        backbone = build_shrunken(family)
        if flex:
            backbone.attend_flexibly()
        module = SJD2Module(backbone, noise, OptimizerConfig(), (side, side))
        module.on_fit_start()
        size = module.image_layout.height, module.image_layout.width
        codes = torch.randint(7, (2, *size), generator=torch.Generator().manual_seed(0))
        found.append(step(module, batch_of()._replace(captions=["red cat", "a dog"], image_ids=codes)))
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-5), name


def test_operations_are_counted_under_a_dense_mask():
    wanted, module = module_of(False), flexible(False, "none", None)
    assert picture_flops(module, batch_of()) == picture_flops(wanted, batch_of()) > 0
    assert module.backbone.takes_visible


@pytest.mark.parametrize("length", [512, 803])
def test_groups_of_rows_attend_as_one_call_does(length):
    """Long sequences on a CPU leave columns behind a group out; heads may share keys."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(3, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    inputs = [tensor.requires_grad_() for tensor in (query, keys, values)]
    mask = additive(sequences(length).dense(length), torch.float32)
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    found, _ = attention.either_attention(layer, query, keys, values, mask)
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (keys, values)]
    wanted = scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-6)
    weights = torch.randn(wanted.shape, generator=generator)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
