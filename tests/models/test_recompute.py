"""Layers that are compiled, or computed again, give the losses and gradients of plain ones."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.recompute import checkpoint_arguments
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.optimizer import OptimizerConfig
from tests.tools.tiny_backbones import tiny_chameleon
from tests.training.test_module import NOISE, Batch, batch_of

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # no trainer here


def module_of(lora: bool, kind: str = "none", backend=None) -> SJD2Module:
    """Always of the same weights."""
    torch._dynamo.reset()
    backbone = tiny_chameleon(7, seed=4, scale=0.3)
    if lora:
        torch.manual_seed(0)
        backbone.add_lora(LoraSettings(rank=2))
    if kind != "none":
        backbone.checkpoint_activations(kind)
    if backend is not None:
        backbone.compile_layers(backend)
    noise = replace(NOISE, num_levels=(3, 3))
    module = SJD2Module(backbone, noise, OptimizerConfig(), (6, 6), bucket=16 if backend else 1)
    module.on_fit_start()
    return module


def step(module: SJD2Module, batch: Batch | None = None) -> dict[str, torch.Tensor]:
    """The loss and all gradients of a batch."""
    module.zero_grad()
    loss = module.training_step(batch or batch_of(), 0)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("kind", ["none", "full", "selective"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_losses_and_gradients_are_those_of_plain_layers(lora, kind, compiled):
    counter = CompileCounterWithBackend("aot_eager")
    wanted = step(module_of(lora))
    module = module_of(lora, kind, counter if compiled else None)
    for _ in range(2):
        found = step(module)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, atol=1e-5), name
    assert len(module.backbone.trunk.layers) > 1
    assert counter.frame_count == compiled, "one artefact for all layers"


def test_batches_of_other_lengths_share_what_is_compiled():
    counter = CompileCounterWithBackend("eager")
    module = module_of(False, "none", counter)
    batch, fewer = batch_of(), batch_of()._replace(captions=["red", "dog", "blue", "cat"])
    for number, given in enumerate((batch, fewer, batch)):
        module.training_step(given, number).backward()
    assert counter.frame_count == 1
    module.bucket = 1
    module.training_step(fewer, 0)
    assert counter.frame_count == 2, "the control: another length is compiled anew"


def test_decoding_does_not_run_what_was_compiled_for_training():
    counter = CompileCounterWithBackend("eager")
    module = module_of(False, "none", counter)
    backbone = module.backbone.eval()
    decode(backbone, ["red"], [0], DecodingConfig("sjd2", 4, 1), backbone.layout(4, 4))
    assert counter.frame_count == 0
    cache = backbone.new_cache(1, 4)
    columns = torch.arange(4)[None]
    cache.place(columns, 4)
    given = torch.randn(1, 4, backbone.hidden_size), columns, torch.ones(1, 1, 4, 4).tril().bool()
    with torch.no_grad():
        backbone(*given, cache)
        assert counter.frame_count == 0
        backbone(*given)
    assert counter.frame_count == 1


def test_selective_computes_fewer_products_again():
    seen = {}
    for kind in ("full", "selective"):
        weight, given = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

        def forward(x, weight=weight):
            for _ in range(4):
                x = (x @ weight).sin()
            return x

        out = torch.utils.checkpoint.checkpoint(forward, given, **checkpoint_arguments(kind))
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        seen[kind] = counter.get_total_flops() // (2 * 4**3)
    assert seen == {"full": 4 + 8, "selective": 2 + 8}
