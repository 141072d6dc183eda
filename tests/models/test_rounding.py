"""A base of one byte a weight under an adapter: its products, its gradients, and what it keeps for them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.rounding import Int8Linear, round_frozen, rounded, train_in_fp8
from sjd2_lightning.run.provenance import weights_hash
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.optimizer import OptimizerConfig
from tests.models.test_recompute import step
from tests.tools.source import REPO
from tests.tools.tiny_backbones import tiny_chameleon
from tests.training.test_module import NOISE

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # no trainer here


def layer_of(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5, bias, dtype=dtype).requires_grad_(False)


def whole(layer: Int8Linear) -> nn.Linear:
    """A plain layer of the weights that the codes stand for."""
    found = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.scale.dtype)
    found.weight.data, found.bias = layer.weight, layer.bias
    return found.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_scale(dtype):
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    weight[3] *= 1e-20
    codes, scale = rounded(weight)
    assert codes.abs().amax() == 127
    error = (codes.double() * scale.double() - weight.double()).abs()
    assert bool((error <= 0.51 * scale.double() + torch.finfo(dtype).eps * weight.double().abs()).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_weights_that_the_codes_stand_for(computed, bias):
    layer = Int8Linear(layer_of(bias=bias))
    found = []
    for one in (layer, whole(layer)):
        hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=computed == torch.bfloat16):
            out = one(hidden)
        out.float().square().sum().backward()
        found.append((out, hidden.grad))
    assert found[0][0].dtype == computed
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours, wanted, atol=1e-6 if computed == torch.float32 else 0.05)


def test_what_is_kept_for_the_backward_pass_are_codes():
    layer, kept = Int8Linear(layer_of()), []
    note = torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.dtype) or v, lambda v: v)
    with note:
        layer(torch.randn(2, 6, requires_grad=True))
    assert sorted(map(str, kept)) == ["torch.float32", "torch.int8"], "the scale has a number a row"


def module_of(kind: str = "none", backend=None, is_whole: bool = False) -> SJD2Module:
    """An adapter on a rounded base, always of the same weights; or on plain layers that equal it."""
    torch._dynamo.reset()
    backbone = tiny_chameleon(7, seed=4, scale=0.3)
    torch.manual_seed(0)
    backbone.add_lora(LoraSettings(rank=2))
    round_frozen(backbone.trunk.layers)
    if is_whole:
        for part in list(backbone.trunk.layers.modules()):
            for name, layer in list(part.named_children()):
                if isinstance(layer, Int8Linear):
                    setattr(part, name, whole(layer))
    if kind != "none":
        backbone.checkpoint_activations(kind)
    if backend is not None:
        backbone.compile_layers(backend)
    module = SJD2Module(backbone, NOISE, OptimizerConfig(), (6, 6), bucket=16 if backend else 1)
    module.on_fit_start()
    return module


def assert_same(kind: str, backend: str | None = None) -> None:
    """An adapter on rounded layers gets the loss and gradients that it gets on plain ones."""
    wanted, found = step(module_of(is_whole=True)), step(module_of(kind, backend))
    assert len(found) == 1 + 2 * 2 * 7, "the loss, and two matrices for each of seven layers in two"
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_an_adapter_gets_the_gradients_that_it_gets_on_plain_layers(kind):
    assert_same(kind)


@pytest.mark.slow
def test_and_so_it_does_in_compiled_layers():
    """In a process of its own: the compiler does not know what the checks of shapes note."""
    code = "from tests.models.test_rounding import assert_same\nfor kind in ('none', 'full', 'selective'):\n"
    code += "    assert_same(kind, 'aot_eager')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_only_frozen_linear_layers_of_the_trunk_are_rounded():
    backbone, plain = module_of().backbone, tiny_chameleon(7, seed=4, scale=0.3)
    kinds = [type(part) for part in backbone.trunk.layers.modules() if hasattr(part, "in_features")]
    assert kinds.count(Int8Linear) == 14
    assert torch.equal(backbone.slot_table(), plain.slot_table())
    trained = [name for name, weight in backbone.named_parameters() if weight.requires_grad]
    assert len(trained) == 28
    assert all(".lora_" in name for name in trained)
    assert weights_hash(backbone) != weights_hash(module_of(is_whole=True).backbone)


def test_invariant_arithmetic_is_refused():
    backbone = module_of().backbone.eval()
    with pytest.raises(ValueError, match=r"no invariant arithmetic for .*Int8Linear; set decoding\.invar"):
        backbone.decoding_trunk(compiled=False, invariant=True)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_products_in_fp8_train_all_weights_nearly_as_whole_ones(backend):
    """Emulated: the numbers of fp8 on a CPU, whose products are those of float32."""
    pytest.importorskip("torchao")
    found = {}
    for fp8 in (False, True):
        torch._dynamo.reset()
        backbone = tiny_chameleon(7, seed=4, scale=0.3, hidden_size=32)
        if fp8:
            before = dict(backbone.named_parameters())
            train_in_fp8(backbone.trunk.layers, emulate=True)
            assert all(value is before[name] for name, value in backbone.named_parameters())
        if backend is not None:
            backbone.compile_layers(backend)
        module = SJD2Module(backbone, NOISE, OptimizerConfig(), (6, 6), bucket=16 if backend else 1)
        module.on_fit_start()
        found[fp8] = step(module)
    assert found[False].keys() == found[True].keys()
    assert found[True]["loss"] == pytest.approx(float(found[False]["loss"]), rel=0.02)
    assert found[True]["loss"] != found[False]["loss"]
    for name, wanted in found[False].items():
        if "_proj" in name:
            off = (found[True][name] - wanted).norm() / wanted.norm()
            assert 0.001 < off < 0.5, name
