"""Optimizer and schedule: which parameter is stepped how, and the learning rate by step."""

import pytest
import torch
from timm.optim import muon

from sjd2_lightning.training.optimizer import OptimizerConfig, build_optimizer, warmup_cosine
from tests.tools.tiny_backbones import tiny_chameleon


@pytest.fixture
def backbone():
    return tiny_chameleon(7, seed=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(backbone, name):
    optimizer = build_optimizer(backbone.named_parameters(), OptimizerConfig(name, weight_decay=0.1))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trained))
    for group in optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} in ({group["weight_decay"] > 0}, set())


def test_muon_steps_are_orthogonal_for_the_trunks_matrices_alone(backbone):
    optimizer = build_optimizer(
        backbone.named_parameters(), OptimizerConfig("muon", lr=1e-2, weight_decay=0.0)
    )
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in backbone.parameters():
        if p.requires_grad:  # the first row is a hundred times the others
            p.grad = torch.randn(p.shape, generator=generator) * (
                torch.ones(len(p)).index_fill(0, torch.tensor([0]), 100).view(-1, *[1] * (p.ndim - 1))
            )
    optimizer.step()
    for name, p in backbone.named_parameters():
        if p.requires_grad and p.ndim > 1:
            step = p.detach() - before[name]
            if "proj" in name:  # Newton-Schulz: singular values near one another
                values = torch.linalg.svdvals(step)
                assert values[0] < 3 * values[min(p.shape) // 2], name
            elif "embed" in name or "head" in name:  # AdamW's first step: one size, the gradient's sign
                assert step.abs().std() < 0.01 * step.abs().mean(), name


def test_learning_rate_warms_up_and_ends_at_its_share():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_cosine(optimizer, OptimizerConfig(warmup_steps=4, final_lr_share=0.1), 24)
    rates = []
    for _ in range(26):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[14] == pytest.approx(0.55)  # half-way down
    assert rates[24] == rates[25] == pytest.approx(0.1)


@pytest.mark.parametrize("has_units", [False, True])
def test_muon_orthogonalises_in_fp32_where_there_are_no_bf16_units(backbone, monkeypatch, has_units):
    name = "zeropower_via_newtonschulz"
    monkeypatch.setattr(
        muon, name, getattr(muon.zeropower_via_newtonschulz, "func", muon.zeropower_via_newtonschulz)
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    for _ in range(2):
        build_optimizer(backbone.named_parameters(), OptimizerConfig("muon"))
    used = getattr(muon, name)
    assert getattr(used, "keywords", {}) == ({} if has_units else {"dtype": torch.float32})
    assert used(torch.randn(4, 4), 5, [(3.4445, -4.775, 2.0315)]).isfinite().all()
