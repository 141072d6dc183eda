"""What is said of the pace: against a clock that is set by hand, and operations against a count by hand."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.rounding import round_frozen
from sjd2_lightning.training import speed
from sjd2_lightning.training.speed import Speed, peak_of, picture_flops, trained_share
from tests.training.test_module import OFF, QUIET, batch_of, loader, module_of


def test_the_pace_is_that_of_the_steps_and_not_of_validations(monkeypatch):
    logged, clock = {}, [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    root = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=3, strategy=root)
    trainer.precision, trainer.estimated_stepping_batches = "bf16-mixed", 10
    module = SimpleNamespace(device=root.root_device)
    module.log = lambda name, value, **_: logged.update({name: value})
    watch = Speed()
    for step in range(1, 7):
        watch.on_train_batch_start(trainer, module, batch_of(), step)
        clock[0] += 0.5
        trainer.global_step = step
        watch.on_train_batch_end(trainer, module, None, batch_of(), step)
        watch.on_validation_start(trainer, module)
        clock[0] += 100
    assert logged["train/step_seconds"] == 0.5
    logged.clear()
    for step in range(7, 9):
        watch.on_train_batch_start(trainer, module, batch_of(), step)
        clock[0] += 0.5
        trainer.global_step = step
        watch.on_train_batch_end(trainer, module, None, batch_of(), step)
    assert logged.pop("train/memory_gib") > 0
    codes = batch_of().image_ids.numel()
    assert logged == pytest.approx(
        {"train/tokens_per_s": 3 * codes / 0.5, "train/step_seconds": 0.5, "train/hours_left": 2 * 0.5 / 3600}
    )


def test_lightning_logs_it():
    seen = {}

    class Rows(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            seen.update(metrics)

    logger = Rows("unused")
    logger.save = lambda: None
    settings = QUIET | {"logger": logger, "log_every_n_steps": 1, "callbacks": [Speed()]}
    L.Trainer(max_steps=2, **settings).fit(module_of(OFF), loader([batch_of()] * 2))
    names = {"tokens_per_s", "step_seconds", "memory_gib", "hours_left"}
    assert {f"train/{name}" for name in names} <= set(seen)
    assert "train/mfu" not in seen, "the peak of a CPU is not known"


def test_operations_are_those_of_the_matrices():
    """Linear layers by hand, two operations a weight and token, and attention's two products."""
    module, batch = module_of(OFF), batch_of()
    backbone = module.backbone
    tokens = len(module._prompts(batch.captions[:1], None)[0]) + module.image_layout.num_slots - 1
    layers = backbone.trunk.layers
    weights = sum(part.weight.numel() for part in layers.modules() if isinstance(part, torch.nn.Linear))
    config = backbone.model.config
    attention = len(layers) * 2 * 2 * tokens**2 * config.hidden_size
    # embeddings of the table's codes and the head, which is read at the codes alone
    head = 2 * 9 * config.hidden_size * backbone.num_codes
    forward = 2 * tokens * weights + attention + head
    assert trained_share(backbone) == 1
    assert picture_flops(module, batch) == pytest.approx(3 * forward, rel=1e-6)
    backbone.add_lora(LoraSettings(rank=2))
    assert 0 < trained_share(backbone) < 0.5
    assert picture_flops(module, batch) < 2.7 * 1.3 * forward
    share, operations = trained_share(backbone), picture_flops(module, batch)
    round_frozen(layers)
    assert (trained_share(backbone), picture_flops(module, batch)) == (share, operations)


def test_a_card_is_known_by_its_name():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA T4") is None
