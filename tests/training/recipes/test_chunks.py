"""The recipe of policies: it learns, follows a teacher, and its loss has the gradient that it says."""

import math

import pytest
import torch

from sjd2_lightning.models.policy import PolicySizes, load_policy
from sjd2_lightning.training.recipes import ChunkRecipe
from sjd2_lightning.training.recipes.chunks import ChunkModule, Chunks
from tests.training.recipes.test_clip import quiet_trainer

SIZES = PolicySizes(num_bins=16, num_steps=2, width=16, num_layers=1, head_width=8)


def recipe(**values) -> ChunkRecipe:
    return ChunkRecipe(**{"sizes": SIZES, "num_demonstrations": 3, **values})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    module = ChunkModule(recipe(), str(folder), lr=5e-3)
    trainer = quiet_trainer(max_steps=40, limit_val_batches=1)
    data = Chunks(recipe(), 16)
    before = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val/loss"]) < before - 0.3
    return str(folder)


def batch_of(values):
    data = Chunks(values, 16)
    data.setup("fit")
    return next(iter(data.train_dataloader())), data


def test_labels_come_from_where_the_distance_says(teacher, caplog):
    caplog.set_level("INFO", logger="sjd2_lightning")
    shown = batch_of(recipe())[1].train_set.labels
    pure, data = batch_of(recipe(teacher=teacher, max_distance=math.inf))
    assert torch.equal(data.train_set.labels.flatten(1), data.train_set.followed.ends.long())
    assert torch.equal(pure.labels, pure.ends)
    assert "labels: 100 % the teacher's, 0 % demonstrations" in caplog.text
    truth = batch_of(recipe(teacher=teacher, max_distance=-1, consistency=1.0))[1].train_set
    assert torch.equal(truth.labels, shown)
    assert "labels: 0 % the teacher's, 100 % demonstrations" in caplog.text
    mixed = batch_of(recipe(teacher=teacher, max_distance=3.0))[1].train_set.labels
    own = [(mixed == other).flatten(1).all(1) for other in (shown, data.train_set.labels)]
    assert (own[0] | own[1]).all()
    assert not own[0].all()
    assert not own[1].all()


def test_consistency_moves_what_is_said_behind_states_and_not_behind_ends(teacher):
    values = recipe(teacher=teacher, max_distance=math.inf, consistency=1.0)
    batch, _ = batch_of(values)
    others = torch.randint(0, 16, batch.ends.shape, generator=torch.Generator().manual_seed(1))
    batch = batch._replace(ends=others)  # so that it matters whose they are
    module = ChunkModule(values)
    loss = module.consistency_loss(batch)
    assert loss > 0
    assert module.consistency_loss(batch._replace(states=batch.ends)).abs() < 1e-6
    loss.backward()
    by_rule = [weight.grad.clone() for weight in module.policy.parameters() if weight.grad is not None]
    module.zero_grad()
    target = module.logits(batch.numbers, batch.ends).softmax(-1).detach()
    found = module.logits(batch.numbers, batch.states).log_softmax(-1)
    (-(target * found).sum(-1).mean()).backward()  # a target without gradient: KL and cross-entropy agree
    by_hand = [weight.grad for weight in module.policy.parameters() if weight.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(by_rule, by_hand, strict=True))


def test_a_distilled_policy_is_saved(teacher, tmp_path):
    values = recipe(teacher=teacher, max_distance=2.0, consistency=1.0)
    module = ChunkModule(values, str(tmp_path))
    start = load_policy(teacher)
    assert all(torch.equal(a, b) for a, b in zip(module.policy.parameters(), start.parameters(), strict=True))
    quiet_trainer(max_steps=3, limit_val_batches=1).fit(module, Chunks(values, 16))
    saved = load_policy(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(module.policy.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_distance": -2.0}, "max_distance=-2.0: must be at least -1"),
        ({"max_distance": math.nan}, "max_distance=nan: must be at least -1"),
        ({"consistency": 1.0}, "consistency=1: needs a teacher, and teacher=null"),
        ({"max_distance": 0.0}, "max_distance=0: needs a teacher, and teacher=null"),
        ({"teacher": "nowhere"}, "teacher=nowhere: there is no policy.json"),
        ({"label_weight": 0.0}, "label_weight=0"),
        ({"sizes": PolicySizes(width=20)}, "sizes.width=20"),
    ],
)
def test_values_that_make_no_sense_are_named(values, message):
    assert any(line.startswith(message) for line in recipe(**values).problems())


def test_a_teacher_of_other_sizes_is_refused(teacher):
    with pytest.raises(ValueError, match=r"ceed\.teacher=.*make them equal"):
        ChunkModule(recipe(sizes=PolicySizes(width=32), teacher=teacher))
