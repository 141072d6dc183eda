"""The pace of a training is said once, and only where it takes long."""

import logging
import math
from types import SimpleNamespace

import pytest

from sjd2_lightning.training import pace


@pytest.mark.parametrize(
    ("each", "num_steps", "said"), [(1.0, 100, True), (0.1, 100, False), (1.0, math.inf, False)]
)
def test_the_estimate_comes_after_a_few_steps(monkeypatch, caplog, each, num_steps, said):
    caplog.set_level(logging.INFO, logger=pace.__name__)
    watch, trainer = pace.Pace(), SimpleNamespace(global_step=0, estimated_stepping_batches=num_steps)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: each * trainer.global_step)
    assert math.isnan(watch.seconds_left(trainer))
    for step in range(1, 11):
        trainer.global_step = step
        watch.on_train_batch_end(trainer, None, None, None, step)
    lines = [record.getMessage() for record in caplog.records]
    expected = "training: 96 more steps at 1.00 s: about 96 s, validations not counted"
    assert lines == ([expected] if said else [])
