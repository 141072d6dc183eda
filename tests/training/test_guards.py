"""What stops a step, and what is only counted."""

import lightning as L
import pytest
import torch

from sjd2_lightning.training.guards import NonFiniteGuard, TrainingWatch
from tests.training.test_module import QUIET, loader


class Given(L.LightningModule):
    """Its losses are given; gradients are those of the weight, whatever the loss is."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses = torch.nn.Parameter(torch.ones(())), losses

    def training_step(self, batch, batch_idx):
        return self.weight - self.weight.detach() + self.losses[batch_idx]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class CountingLoader:
    """Says how many samples were left out, as the project's does."""

    num_skipped = 3

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))

    def __len__(self):
        return self.length


def fit(losses, *callbacks, data=None, **settings):
    module = Given(losses)
    trainer = L.Trainer(max_epochs=1, callbacks=list(callbacks), **QUIET, **settings)
    trainer.fit(module, data or loader(list(range(len(losses)))))
    return module, trainer


def test_an_infinite_loss_with_finite_gradients_stops_training():
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        fit([1.0, float("inf"), 1.0], NonFiniteGuard())


def test_a_bad_batch_spoils_the_step_it_is_accumulated_in():
    guard = NonFiniteGuard("skip")
    module, _ = fit([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0], guard, accumulate_grad_batches=2)
    assert guard.num_skipped == 1
    assert float(module.weight.detach()) == pytest.approx(1 - 2 * 0.1)


def test_jumps_of_the_loss_are_counted_and_leave_the_mean_alone():
    watch = TrainingWatch(3.0)
    _, trainer = fit([1.0] * 30 + [50.0, 50.0, float("nan")] + [1.0] * 5, watch)
    assert float(watch.num_spikes) == 3
    assert float(trainer.callback_metrics["train/loss_spikes"]) == 3
    resumed = TrainingWatch(3.0)
    resumed.load_state_dict(watch.state_dict())
    assert float(resumed.num_spikes) == 3
    assert resumed.state_dict() == watch.state_dict()
    assert watch.state_dict()["state"][0] == pytest.approx(1.0)


def test_the_beginning_is_no_jump():
    watch = TrainingWatch(3.0)
    fit([1.0, 9.0, 1.0, 9.0], watch)
    assert float(watch.num_spikes) == 0


def test_samples_that_were_left_out_are_logged():
    _, trainer = fit([1.0, 1.0], TrainingWatch(None), data=CountingLoader(2))
    assert float(trainer.callback_metrics["train/skipped_samples"]) == 3
    assert "train/loss_spikes" not in trainer.callback_metrics
