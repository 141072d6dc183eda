"""The recipe of thinking in latents: each loss by hand, what is trained when; it learns and saves."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from sjd2_lightning.data.sources.arithmetic import Problem, ProblemSource
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.thinker import load_thinker
from sjd2_lightning.models.thinking import answers_of, think
from sjd2_lightning.training.optimizer import OptimizerConfig
from sjd2_lightning.training.recipes import ThoughtRecipe
from sjd2_lightning.training.recipes.latent_chain import (
    ProblemBatches,
    ProblemData,
    Read,
    ThoughtModule,
    distillation_loss,
    step_loss,
    student_read,
    teacher_read,
)
from tests.models.test_thinking import SETTINGS, SIZES, thinker
from tests.training.recipes.test_clip import quiet_trainer

PROBLEMS = [
    Problem("3+4*2 mod 5", ("<<3+4=2>>", "<<2*2=4>>"), "4"),
    Problem("1-1 mod 12", ("<<1-1=0>>",), "10"),
]
RECIPE = ThoughtRecipe(SIZES, SETTINGS, ProblemSource(2, 4), num_held_out=4)
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.01)


def nats(model, hidden, texts):
    """Cross-entropy of each token of a list of ids, at hidden states (L, d)."""
    return F.cross_entropy(model.logits(hidden), torch.tensor(texts), reduction="none").tolist()


@torch.no_grad()
def test_the_teacher_learns_what_stands_behind_the_question():
    model = thinker()
    found, wanted = teacher_read(model, PROBLEMS), []
    for row, (problem, said) in enumerate(zip(PROBLEMS, ["<<3+4=2>>A:4", "A:10"], strict=True)):
        question, behind = model.ids([problem.question])[0], [*model.ids([said])[0], model.end]
        out = model.feed(model.embed(torch.tensor([question + behind])), all_layers=True)
        wanted += nats(model, out.hidden[0, len(question) - 1 : -1], behind)
        colon = len(question) + len(said) - len(problem.answer) - 1
        assert (question + behind)[colon] == model.ids([":"])[0][0]
        for own, layer in zip(found.before, out.layers, strict=True):
            torch.testing.assert_close(own[row], layer[0, colon], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, torch.tensor(wanted).mean())


@torch.no_grad()
def test_the_student_learns_answer_and_end_alone():
    model = thinker()
    thought = think(model, [problem.question for problem in PROBLEMS], 6, 3)
    found, wanted = student_read(model, thought, PROBLEMS), []
    for row, problem in enumerate(PROBLEMS):
        own = think(model, [problem.question], 6, 3)
        behind = [*model.ids([problem.answer])[0], model.end]
        ids = torch.tensor([[*model.ids(["A:"])[0], *behind]])
        out = model.feed(
            torch.cat([model.mark("eot", 1), model.embed(ids)], dim=1), own.past, all_layers=True
        )
        wanted += nats(model, out.hidden[0, 2:-1], behind)
        for layer, whole in zip(found.before, out.layers, strict=True):
            torch.testing.assert_close(layer[row], whole[0, 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, torch.tensor(wanted).mean())


def test_distillation_is_the_mean_over_layers_and_does_not_move_the_teacher():
    own = tuple(torch.randn(3, 4, requires_grad=True) for _ in range(2))
    other = tuple(torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = distillation_loss(Read(torch.zeros(()), own), Read(torch.zeros(()), other))
    wanted = [F.smooth_l1_loss(a, b) / b.std() for a, b in zip(own, other, strict=True)]
    torch.testing.assert_close(loss, sum(wanted) / 2)
    loss.backward()
    assert all(value.grad is None for value in other)
    assert all(value.grad.abs().sum() > 0 for value in own)


@torch.no_grad()
def test_latents_foretell_the_results_of_steps_one_token_each():
    model = thinker()
    problems = [PROBLEMS[0], Problem("9+9+9", ("<<9+9=18>>", "<<18+9=27>>"), "27")]
    thought = think(model, [problem.question for problem in problems], 6, 3)
    wanted = nats(model, thought.hidden[0, :2], model.ids(["24"])[0])
    wanted += nats(model, thought.hidden[1, :4], model.ids(["1827"])[0])
    torch.testing.assert_close(step_loss(model, thought, problems), torch.tensor(wanted).mean())
    without = [Problem("1", (), "1")]
    assert step_loss(model, think(model, ["1"], 6, 3), without) == 0


def test_losses_are_weighed_and_begin_in_their_turn(monkeypatch):
    module = ThoughtModule(replace(RECIPE, teacher_loss=2.0, answer_loss=0.5, step_loss=3.0), OPTIMIZER)
    plain = ThoughtModule(RECIPE, OPTIMIZER)
    plain.load_state_dict(module.state_dict())
    found, published = module.losses(PROBLEMS), plain.losses(PROBLEMS)
    assert set(published) == {"teacher", "answer", "distillation"}, "the published losses are the default"
    ratios = {name: float(found[name].detach() / published[name].detach()) for name in published}
    assert ratios == pytest.approx({"teacher": 2, "answer": 0.5, "distillation": 1}, rel=1e-4)
    assert found["steps"] > 0
    early = ThoughtModule(replace(RECIPE, teacher_steps=5, step_loss=1.0), OPTIMIZER)
    assert set(early.losses(PROBLEMS)) == {"teacher"}
    monkeypatch.setattr(ThoughtModule, "global_step", 5)
    assert set(early.losses(PROBLEMS)) == {"teacher", "answer", "distillation", "steps"}


def test_it_learns_and_saves(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "few.jsonl"
    few = list(islice(RECIPE.source.training(0), 8))
    path.write_text("".join(json.dumps(problem._asdict()) + "\n" for problem in few))
    source = ProblemSource(train_file=str(path), test_file=str(path))
    recipe = replace(RECIPE, source=source, num_held_out=8, step_loss=1.0, teacher_steps=20, chain_tokens=20)
    module = ThoughtModule(recipe, OPTIMIZER, str(tmp_path))
    data = ProblemData(recipe, batch_size=8)
    trainer = quiet_trainer(max_steps=160, limit_val_batches=1)
    trainer.fit(module, data)
    found = trainer.validate(module, data, verbose=False)[0]
    assert found["val/accuracy"] == found["val/accuracy_steps"] == 1
    saved = load_thinker(tmp_path)
    questions = [problem.question for problem in few]
    given = [answers_of(own, think(own, questions, 6, 3), 4) for own in (saved, module.thinker.eval())]
    assert given[0] == given[1]


def test_an_adapter_alone_is_trained_and_a_model_without_latents_answers(tmp_path):
    settings = LoraSettings(rank=2, targets=("c_attn", "c_proj"))
    thoughts = replace(SETTINGS, num_latents=0, num_passes=0)
    recipe = replace(RECIPE, lora=settings, thoughts=thoughts, step_loss=1.0, chain_tokens=4)
    module = ThoughtModule(recipe, OPTIMIZER, str(tmp_path))
    table = module.thinker.model.get_input_embeddings().weight.clone()
    trainer = quiet_trainer(max_steps=2, limit_val_batches=1)
    trainer.fit(module, ProblemData(recipe, batch_size=4))
    assert torch.equal(module.thinker.model.get_input_embeddings().weight, table)
    assert any("lora_" in name for name, value in module.named_parameters() if value.requires_grad)
    assert load_thinker(tmp_path).settings.num_latents == 0


def test_batches_are_the_seeds_own():
    first, again, other = (ProblemBatches(RECIPE.source, 3, seed) for seed in (0, 0, 1))
    assert list(islice(first, 4)) == list(islice(again, 4)) != list(islice(other, 4))
    assert len(next(iter(first))) == 3


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match=r"pccot\.thoughts\.num_latents=0: num_passes=2 has"):
        ThoughtModule(replace(RECIPE, thoughts=replace(SETTINGS, num_latents=0, num_passes=2)), OPTIMIZER)
    with pytest.raises(ValueError, match=r"pccot\.lora\.rank=0"):
        ThoughtModule(replace(RECIPE, lora=LoraSettings(rank=0)), OPTIMIZER)
