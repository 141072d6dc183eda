"""Optimizer and schedule: which parameter is stepped how, and the learning rate by step."""

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.optim import muon

from sjd2_lightning.training.checkpoints import VerifiedCheckpointIO
from sjd2_lightning.training.module import SJD2Module
from sjd2_lightning.training.optimizer import OptimizerConfig, build_optimizer, warmup_cosine
from tests.tools.tiny_backbones import tiny_chameleon
from tests.tools.training_runs import differences
from tests.training.test_module import NOISE, QUIET, batch_of, loader


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


@pytest.fixture
def eager():
    """torchao compiles the step of every shape; its values do not change by that."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


def eight_bit_run(folder, start=None, seed=0, name="adamw8bit"):
    """Four steps of a model whose matrices are large enough for states of 8 bits; two checkpoints."""
    backbone = tiny_chameleon(7, hidden_size=64, seed=seed, scale=0.3)
    module = SJD2Module(backbone, NOISE, OptimizerConfig(name, lr=1e-2, warmup_steps=1), (6, 6))
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings = QUIET | {"enable_checkpointing": True, "plugins": [VerifiedCheckpointIO()]}
    trainer = L.Trainer(max_steps=4, callbacks=[save], **settings)
    done = 0 if start is None else 2  # the loader is a plain one
    batches = [batch_of(number) for number in (*range(done, 4), *range(done))]
    trainer.fit(module, loader(batches), ckpt_path=start)
    return module, trainer.optimizers[0]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_states_of_8_bits_go_on_bitwise_from_plain_tensors(eager, tmp_path):
    whole, optimizer = eight_bit_run(tmp_path)
    states = [value for own in optimizer.state.values() for value in own.values()]
    assert sum(hasattr(value, "qmap") for value in states) == 2 * 2 * 7, "both moments of every matrix"
    wanted = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["optimizer_states"]
    kinds = {
        type(part)
        for own in wanted[0]["state"].values()
        for value in own.values()
        for part in parts_of(value)
    }
    assert kinds == {torch.Tensor}
    again, _ = eight_bit_run(tmp_path / "again", tmp_path / "step=2.ckpt", seed=1)
    for (name, value), found in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, value), name
    found = torch.load(tmp_path / "again" / "step=4.ckpt", weights_only=True)["optimizer_states"]
    assert not differences(wanted, found)


def parts_of(value):
    """Tensors of a state as it lies in a checkpoint."""
    return value["eight_bit_parts"].values() if isinstance(value, dict) else [value]


def test_states_of_8_bits_are_not_taken_for_whole_ones(eager, tmp_path):
    eight_bit_run(tmp_path)
    with pytest.raises(ValueError, match=r"optimizer\.name=adamw: .*8 bits; go on with optimizer=adamw8bit"):
        eight_bit_run(tmp_path / "again", tmp_path / "step=2.ckpt", name="adamw")


def test_steps_of_8_bits_learn_as_whole_ones(eager, tmp_path):
    """One batch again and again: the loss falls alike."""
    losses = {}
    for name in ("adamw", "adamw8bit"):
        backbone = tiny_chameleon(7, hidden_size=64, seed=0, scale=0.3).train()
        optimizer = build_optimizer(backbone.named_parameters(), OptimizerConfig(name, lr=3e-3))
        module = SJD2Module(backbone, replace(NOISE, enabled=False), OptimizerConfig(name), (6, 6))
        prompts = module._prompts(batch_of().captions, None)
        for _ in range(12):
            optimizer.zero_grad()
            loss = module.losses(batch_of(), prompts, None).total
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], abs=0.05)
    assert losses["adamw"] < 0.7 * math.log(7)
