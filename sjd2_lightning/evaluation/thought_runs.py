"""Answers by several ways of thinking, side by side: the shared comparison, with answers for images.

Every batch of problems is answered in every way, in an order that rotates with the batch, as `jobs` does with
codes. Timing covers question, thought and answer. What a store keeps as an image is a card with the answer.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sjd2_lightning import __version__
from sjd2_lightning.data.sources.arithmetic import Problem
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.jobs import process_name, unfinished_batches
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts, seed_of
from sjd2_lightning.evaluation.results import EvaluationResult
from sjd2_lightning.evaluation.store import Record, RecordStore, discard_other_run, method_fields
from sjd2_lightning.evaluation.thought_methods import ThoughtMethod
from sjd2_lightning.metrics.bootstrap import paired_difference, share_result
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.thinker import Thinker
from sjd2_lightning.models.thinking import Thought, answers_of, explained, read, solved
from sjd2_lightning.run.files import sha256_of_json
from sjd2_lightning.run.provenance import weights_hash
from sjd2_lightning.run.stages import stage

_CARD = (176, 96)  # pixels of a card
_RIGHT, _WRONG = (0, 110, 60), (180, 40, 30)
_SHOWN = 96  # letters of a question or thought on a card


@dataclass(frozen=True)
class Found:
    """What one way found for a problem.

    Attributes:
        answer_ids: token ids of the answer.
        answer: its text.
        thought: its steps in words, or the token that the head reads out of each latent.
        accepted: columns that each pass before the answer made final, the pass over the question first.
        residual: largest change of a number in the last pass over latents; 0 where there was none.
    """

    answer_ids: tuple[int, ...]
    answer: str
    thought: str
    accepted: tuple[int, ...]
    residual: float


@dataclass(frozen=True, kw_only=True)
class ThoughtRecord(Record):
    """One answer.

    Passes are all before the answer prompt is read. A way over latents has one column more than there are
    latents: the one behind the last.

    Attributes:
        answer_ids, answer, thought, residual: see `Found`.
        right: whether the answer is that of the problem, to the letter.
    """

    answer_ids: tuple[int, ...]
    answer: str
    thought: str
    residual: float
    right: bool

    SAME: ClassVar[str] = "token for token of every answer"
    COUNTED: ClassVar[str] = "forward passes before the answer, the one over the question included"

    def percent_equal(self, other: ThoughtRecord) -> int:
        """100 where the answers are equal, else 0."""
        return 100 * (self.answer_ids == other.answer_ids)


@dataclass(frozen=True)
class Answering:
    """A way to answer with its model.

    Attributes:
        thinker: the model, in eval mode.
        method: the way.
        answer_tokens, chain_tokens: tokens of an answer and of an explicit chain at most.
    """

    thinker: Thinker
    method: ThoughtMethod
    answer_tokens: int
    chain_tokens: int

    def __call__(self, questions: Sequence[str]) -> list[Found]:
        """What is found for each question."""
        thinker, method = self.thinker, self.method
        if method.kind == "steps":
            spoken = explained(thinker, questions, self.chain_tokens)
            return [self._found(own.answer_ids, own.steps, (1,) * own.num_tokens) for own in spoken]
        num_latents = thinker.settings.num_latents if method.kind != "none" else 0
        if method.kind == "latents":
            thought = solved(thinker, questions, num_latents, method.schedule)
        else:
            with torch.no_grad():
                thought = read(thinker, questions, num_latents)[2]
        answers = answers_of(thinker, thought, self.answer_tokens)
        seen = readings(thinker, thought)
        if thought.solution is None:
            return [self._found(a, s, (num_latents + 1,)) for a, s in zip(answers, seen, strict=True)]
        counts = (1, *thought.solution.stats.accepted[0])
        last = thought.solution.residuals[-1].tolist()
        return [self._found(a, s, counts, gap) for a, s, gap in zip(answers, seen, last, strict=True)]

    def _found(
        self, answer_ids: Sequence[int], thought: str, accepted: tuple[int, ...], residual: float = 0.0
    ) -> Found:
        return Found(tuple(answer_ids), self.thinker.text(answer_ids), thought, accepted, residual)


@torch.no_grad()
def readings(thinker: Thinker, thought: Thought) -> list[str]:
    """The likeliest token that the head reads out of each latent, with spaces between."""
    ids = thinker.logits(thought.hidden[:, :-1]).argmax(2).tolist()
    return [" ".join(thinker.text([token]) for token in row) for row in ids]


def problem_prompts(problems: Sequence[Problem], seed: int) -> list[PromptItem]:
    """Questions as prompts, numbered."""
    keys = [f"problem-{number:05d}" for number in range(len(problems))]
    items = zip(keys, problems, strict=True)
    return [PromptItem(key, problem.question, seed_of(key, seed)) for key, problem in items]


def answer_methods(
    ways: Mapping[str, Answering],
    prompts: Sequence[PromptItem],
    problems: Sequence[Problem],
    out_dir: str | Path,
    *,
    batch_size: int = 1,
    replace_other: bool = False,
) -> RecordStore:
    """Answers all problems in all ways; a killed run continues with the batch that it was at.

    Args:
        ways: ways by name; with "ar", the chain.
        prompts: the questions.
        problems: the problems, in the same order.
        out_dir: folder of records and cards.
        batch_size: problems answered together.
        replace_other: remove records of another configuration, instead of raising.

    Raises:
        ValueError: unusable prompts, or a folder of another configuration.
    """
    check_prompts(prompts)
    first = ways[BASELINE]
    device = first.thinker.marks.device
    identity = {
        "code": __version__,
        "weights": weights_hash(first.thinker),
        "others": {name: weights_hash(own.thinker) for name, own in ways.items() if own.method.weights},
        "device": device.type,
        "methods": {name: method_fields(own.method) for name, own in ways.items()},
        "prompts": sha256_of_json([item.identity for item in prompts]),
        "answers": sha256_of_json([problem._asdict() for problem in problems]),
        "tokens": [first.answer_tokens, first.chain_tokens],
        "batch_size": batch_size,
    }
    if replace_other:
        discard_other_run(out_dir, identity)
    store = RecordStore(out_dir, identity, kind=ThoughtRecord)
    is_warm = False
    doing = "answering", "problems"
    for number, batch, order in unfinished_batches(prompts, list(ways), batch_size, store, doing):
        questions = [item.prompt for item in batch]
        calls = {name: partial(ways[name], questions) for name in order}
        if not is_warm:  # the first call of a shape is slower
            with stage("warming up"):
                is_warm = all(call() for call in calls.values())
        timings = {name: timed(call, device) for name, call in calls.items()}
        start = number * batch_size
        for name, (found, seconds) in timings.items():
            own = _records(name, number, batch, problems[start : start + batch_size], found, seconds)
            store.append(own, [card(record) for record in own])
    return store


def _records(
    method: str,
    number: int,
    batch: Sequence[PromptItem],
    problems: Sequence[Problem],
    found: Sequence[Found],
    seconds: float,
) -> list[ThoughtRecord]:
    """Records of one batch in one way."""
    return [
        ThoughtRecord(
            key=item.key,
            prompt=item.prompt,
            seed=item.seed,
            method=method,
            batch=number,
            batch_size=len(batch),
            nfe=len(own.accepted),
            num_generated=sum(own.accepted),
            accepted=own.accepted,
            settled_iteration=tuple(np.repeat(np.arange(len(own.accepted)), own.accepted).tolist()),
            size=(1, sum(own.accepted)),
            seconds=seconds,
            process=process_name(os.getpid()),
            answer_ids=own.answer_ids,
            answer=own.answer,
            thought=own.thought,
            residual=own.residual,
            right=own.answer == problem.answer,
        )
        for item, problem, own in zip(batch, problems, found, strict=True)
    ]


def card(record: ThoughtRecord) -> np.ndarray:
    """(h, w, 3) uint8 picture of a question, what was thought, and the answer, green where it is right."""
    picture = Image.new("RGB", _CARD, "white")
    draw = ImageDraw.Draw(picture)
    small, large = ImageFont.load_default(11), ImageFont.load_default(20)
    draw.multiline_text((6, 4), textwrap.fill(record.prompt[:_SHOWN], 28), (60, 60, 60), small)
    draw.multiline_text((6, 34), textwrap.fill(record.thought[:_SHOWN], 28), (110, 110, 110), small)
    draw.text((6, 70), f"= {record.answer[:12]}", _RIGHT if record.right else _WRONG, large)
    return np.asarray(picture)


def with_accuracy(result: EvaluationResult, num_resamples: int = 2000) -> EvaluationResult:
    """The result with `accuracy`, and that less the chain's, paired, as `accuracy_minus_ar`.

    Args:
        result: result whose records are answers.
        num_resamples: bootstrap resamples of the difference.
    """
    right = {
        name: [record.right for record in method.records if isinstance(record, ThoughtRecord)]
        for name, method in result.methods.items()
    }
    methods = {}
    for name, method in result.methods.items():
        protocol = "share of generated answers that are right to the letter"
        own = {"accuracy": share_result("accuracy", right[name], protocol)}
        if name != BASELINE:
            pair = (right[name], right[BASELINE])
            own["accuracy_minus_ar"] = paired_difference(
                "accuracy_minus_ar", *pair, "paired by problem", num_resamples
            )
        methods[name] = replace(method, measured=method.measured | own)
    return replace(result, methods=methods)
