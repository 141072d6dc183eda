"""Recipe of thinking in latents: the losses of PCCoT (arXiv 2506.18582), and a step loss of ours.

One model is teacher and student: the teacher reads explicit steps, the student latents, and both end in the
answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sjd2_lightning.data.sources.arithmetic import Problem, ProblemSource
from sjd2_lightning.models.thinker import Thinker, build_thinker
from sjd2_lightning.models.thinking import Thought, answers_of, continued, explained, think
from sjd2_lightning.training.optimizer import OptimizerConfig, build_optimizer, with_one_cycle
from sjd2_lightning.training.recipes import ThoughtRecipe

_BATCH = 250  # held-out problems that are answered together
IGNORED = -100  # label of a token that has no loss


class Read(NamedTuple):
    """What one side made of a batch.

    Attributes:
        loss: mean cross-entropy of its tokens; scalar.
        before: (B, d) hidden states of each layer at the last token in front of the answer.
    """

    loss: Tensor
    before: tuple[Tensor, ...]


def teacher_read(thinker: Thinker, problems: Sequence[Problem]) -> Read:
    """Question, explicit steps but the last, answer prompt, answer; the loss begins behind the question."""
    questions = thinker.ids([problem.question for problem in problems])
    steps = thinker.ids(["".join(problem.leading_steps) for problem in problems])
    answers = thinker.ids([problem.answer for problem in problems])
    prompt, parts = thinker.prompt, list(zip(questions, steps, answers, strict=True))
    ids, mask = thinker.padded([[*q, *s, *prompt, *a, thinker.end] for q, s, a in parts])
    fed = thinker.feed(thinker.embed(ids[:, :-1]), mask=mask[:, :-1], all_layers=True)
    lengths = torch.tensor([len(question) for question in questions], device=ids.device)
    places = torch.arange(1, ids.shape[1], device=ids.device)
    labels = ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (places < lengths[:, None]), IGNORED)
    rows = torch.arange(len(problems), device=ids.device)
    last = torch.tensor([len(q) + len(s) + len(prompt) - 1 for q, s, _ in parts], device=ids.device)
    return Read(_cross_entropy(thinker, fed.hidden, labels), tuple(layer[rows, last] for layer in fed.layers))


def student_read(thinker: Thinker, thought: Thought, problems: Sequence[Problem]) -> Read:
    """Answers behind thoughts; the loss is that of answer and end token."""
    answers = [problem.answer for problem in problems]
    fed, ids, mask = continued(thinker, thought, answers, all_layers=True)
    behind = -ids.shape[1]
    labels = ids.masked_fill(mask == 0, IGNORED)
    loss = _cross_entropy(thinker, fed.hidden[:, behind:], labels)
    return Read(loss, tuple(layer[:, behind] for layer in fed.layers))


def distillation_loss(student: Read, teacher: Read) -> Tensor:
    """Mean over layers of the smooth L1 distance to the teacher, over the teacher's deviation; scalar.

    No gradient reaches the teacher.
    """
    distances = [
        F.smooth_l1_loss(own, other.detach()) / other.detach().std().clamp(min=1e-6)
        for own, other in zip(student.before, teacher.before, strict=True)
    ]
    return torch.stack(distances).mean()


def step_loss(thinker: Thinker, thought: Thought, problems: Sequence[Problem]) -> Tensor:
    """Cross-entropy of the results of steps, at what latents are made of, by the shared head; scalar (ours).

    Latent n must say token n of all results of a problem, one after the other; further ones are free.
    """
    num_latents = thought.hidden.shape[1] - 1
    tokens = iter(thinker.ids([result for problem in problems for result in problem.results]))
    rows = [[token for _ in problem.results for token in next(tokens)] for problem in problems]
    labels = torch.tensor([(row + [IGNORED] * num_latents)[:num_latents] for row in rows])
    if not (labels != IGNORED).any():
        return thought.hidden.sum() * 0
    return _cross_entropy(thinker, thought.hidden[:, :-1], labels.to(thought.hidden.device))


def _cross_entropy(thinker: Thinker, hidden: Tensor, labels: Tensor) -> Tensor:
    kept = labels != IGNORED
    return F.cross_entropy(thinker.logits(hidden[kept]), labels[kept])


class ThoughtModule(L.LightningModule):
    """A language model that learns to answer behind latents.

    Args:
        recipe: model, losses and their weights.
        optimizer: learning rate, weight decay and moments of the optimizer.
        out_dir: folder that `on_train_end` saves for `load_thinker`; None saves nothing.

    Raises:
        ValueError: wrong values, or a folder of the language model that cannot be used.
    """

    LOGGED = ("train/loss", "val/accuracy", "val/accuracy_steps")

    def __init__(self, recipe: ThoughtRecipe, optimizer: OptimizerConfig, out_dir: str | None = None) -> None:
        super().__init__()
        if found := recipe.problems():
            raise ValueError("; ".join(f"pccot.{line}" for line in found))
        self.recipe, self.optimizer_config, self.out_dir = recipe, optimizer, out_dir
        self.thinker = build_thinker(recipe.model, recipe.thoughts)
        if recipe.lora is not None:
            self.thinker.add_lora(recipe.lora)

    def losses(self, problems: Sequence[Problem]) -> dict[str, Tensor]:
        """Each loss of a batch by its name; the first `teacher_steps` steps have the teacher's alone."""
        recipe, thinker = self.recipe, self.thinker
        teacher = teacher_read(thinker, problems)
        if self.global_step < recipe.teacher_steps:
            return {"teacher": teacher.loss}
        thoughts = recipe.thoughts
        questions = [problem.question for problem in problems]
        thought = think(thinker, questions, thoughts.num_latents, thoughts.num_passes)
        student = student_read(thinker, thought, problems)
        found = {
            "teacher": recipe.teacher_loss * teacher.loss,
            "answer": recipe.answer_loss * student.loss,
            "distillation": recipe.distillation_loss * distillation_loss(student, teacher),
        }
        if recipe.step_loss:
            found["steps"] = recipe.step_loss * step_loss(thinker, thought, problems)
        return found

    def training_step(self, batch: list[Problem], batch_idx: int) -> Tensor:
        loss = torch.stack(list(self.losses(batch).values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        recipe, thinker = self.recipe, self.thinker
        thoughts = recipe.thoughts
        questions = [problem.question for problem in batch]
        thought = think(thinker, questions, thoughts.num_latents, thoughts.num_passes)
        answers = answers_of(thinker, thought, recipe.answer_tokens)
        spoken = [found.answer_ids for found in explained(thinker, questions, recipe.chain_tokens)]
        self.log("val/accuracy", self._share_right(answers, batch), prog_bar=True, batch_size=len(batch))
        self.log("val/accuracy_steps", self._share_right(spoken, batch), batch_size=len(batch))

    def _share_right(self, answers: Sequence[Sequence[int]], problems: Sequence[Problem]) -> float:
        text = self.thinker.text
        right = [text(own) == problem.answer for own, problem in zip(answers, problems, strict=True)]
        return sum(right) / len(right)

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        optimizer = build_optimizer(self.thinker.named_parameters(), config)
        steps = int(self.trainer.estimated_stepping_batches)
        return with_one_cycle(optimizer, config.lr, steps, self.recipe.warmup_share)

    def on_train_end(self) -> None:
        if self.out_dir is not None and self.trainer.is_global_zero:
            self.thinker.save(self.out_dir)


class ProblemBatches(IterableDataset[list[Problem]]):
    """Endless batches of problems.

    Args:
        source: where problems come from.
        batch_size: problems in a batch.
        seed: seed of the problems and their order.
    """

    def __init__(self, source: ProblemSource, batch_size: int, seed: int) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed

    def __iter__(self) -> Iterator[list[Problem]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        drawn = islice(self.source.training(self.seed), first, None, step)
        while batch := list(islice(drawn, self.batch_size)):
            yield batch


class ProblemData(L.LightningDataModule):
    """Problems to train on, and held-out ones to answer.

    Args:
        recipe: source and number of held-out problems.
        batch_size: problems a training step.
        seed: seed of the problems.
        num_workers: number of processes of the training loader.
    """

    def __init__(self, recipe: ThoughtRecipe, batch_size: int, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.batches = ProblemBatches(recipe.source, batch_size, seed)
        self.num_held_out, self.num_workers = recipe.num_held_out, num_workers

    def train_dataloader(self) -> DataLoader[list[Problem]]:
        return DataLoader(self.batches, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[list[Problem]]:
        found = self.batches.source.held_out(self.num_held_out, self.batches.seed)
        batches = [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
