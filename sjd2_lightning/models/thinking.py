"""Thinking in latents as a causal fixed point, and in words; answers by generation (PCCoT, arXiv 2506.18582).

    question <bot> e_1 .. e_c <eot> answer prompt, answer, end

e_1 is the projected hidden state of <bot>, e_(j+1) that of e_j. Pass 0 reads the question with <latent> in
the place of every e_j and gives a first guess of all; a pass feeds the guess at those places and gives the
next. The answer reads the keys and values of the last pass, that is of what it was fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2_lightning.fixed_point import Schedule, Solution, follow, solve, unroll
from sjd2_lightning.models.thinker import Fed, Past, Thinker


class Latents:
    """e_(j+1) = f(question, e_1 .. e_j) as a causal map; see `fixed_point.CausalMap`.

    One column more than there are latents: what the last one leads to, which nothing reads.

    Args:
        thinker: the model.
        past: what it keeps of question and <bot>.
        num_latents: c.
        hidden: (B, 1, d) hidden state of <bot>.

    Attributes:
        past: what the model keeps of question, <bot> and the latents that were fed.
        hidden: hidden states of <bot> and of these latents.
    """

    def __init__(self, thinker: Thinker, past: Past, num_latents: int, hidden: Tensor) -> None:
        self.thinker, self.past, self.hidden, self.length = thinker, past, hidden, num_latents + 1
        self.num_read = past.mask.shape[1]

    def values(self, first: int, fed: Tensor) -> Tensor:
        """(B, L, d) new values of columns first + 1 .. first + L."""
        out = self.thinker.feed(fed, self.past.cut(self.num_read + first))
        self.past = out.past
        self.hidden = torch.cat([self.hidden[:, : first + 1], out.hidden], dim=1)
        return self.thinker.project(out.hidden)


@dataclass(frozen=True)
class Thought:
    """What a model holds before it answers.

    Attributes:
        past: what it keeps of question, <bot> and latents.
        hidden: (B, c + 1, d) hidden states of <bot> and of the latents as they were fed last: what latent 1,
            .., c and the column behind are made of.
        solution: how the latents were found; None where no pass was made over them.
    """

    past: Past
    hidden: Tensor
    solution: Solution | None = None


def read(thinker: Thinker, questions: Sequence[str], num_latents: int) -> tuple[Past, Tensor, Thought]:
    """Pass 0: questions, <bot> and <latent> in the place of every latent.

    Args:
        thinker: the model.
        questions: texts, padded on the left.
        num_latents: number of places.

    Returns:
        What the model keeps of questions and <bot>, a guess (B, num_latents + 1, d) of the latents and the
        column behind them, and the thought of one who goes no further: pause tokens.
    """
    ids, mask = thinker.padded(thinker.ids(questions), left=True)
    rows = len(questions)
    columns = [thinker.embed(ids), thinker.mark("bot", rows), thinker.mark("latent", rows, num_latents)]
    ones = mask.new_ones(rows, 1 + num_latents)
    fed = thinker.feed(torch.cat(columns, dim=1), mask=torch.cat([mask, ones], dim=1))
    num_read = ids.shape[1] + 1
    guess = thinker.project(fed.hidden[:, num_read - 1 :])
    return fed.past.cut(num_read), guess, Thought(fed.past, fed.hidden[:, num_read - 1 :])


def think(thinker: Thinker, questions: Sequence[str], num_latents: int, num_passes: int) -> Thought:
    """Thoughts after a number of passes, with gradients; c passes or more are the chain, latent by latent.

    Args:
        thinker: the model.
        questions: texts.
        num_latents: c.
        num_passes: T; 0 leaves pause tokens.
    """
    is_chain = 0 < num_latents <= num_passes
    past, guess, pause = read(thinker, questions, 0 if is_chain else num_latents)
    if not num_passes:
        return pause
    latents = Latents(thinker, past, num_latents, pause.hidden[:, :1])
    if is_chain:
        follow(latents, guess)
    else:
        unroll(latents, guess, num_passes)
    return Thought(latents.past, latents.hidden)


@torch.no_grad()
def solved(thinker: Thinker, questions: Sequence[str], num_latents: int, schedule: Schedule) -> Thought:
    """Thoughts by a schedule: a window of 1 is the chain, `max_passes` PCCoT, neither a fixed point."""
    past, guess, pause = read(thinker, questions, num_latents)
    latents = Latents(thinker, past, num_latents, pause.hidden[:, :1])
    solution = solve(latents, guess, schedule)
    return Thought(latents.past, latents.hidden, solution)


def continued(
    thinker: Thinker, thought: Thought, answers: Sequence[str], all_layers: bool = False
) -> tuple[Fed, Tensor, Tensor]:
    """Reads <eot>, the answer prompt and given answers behind a thought.

    Returns:
        What was made of them; ids of answers and end tokens (B, A), padded on the right; and their mask.
        The column that foretells answer token n is the n-th from the last token of the prompt on.
    """
    rows, width = len(answers), len(thinker.prompt)
    ids, mask = thinker.padded([[*thinker.prompt, *own, thinker.end] for own in thinker.ids(answers)])
    columns = torch.cat([thinker.mark("eot", rows), thinker.embed(ids)], dim=1)
    seen = torch.cat([mask.new_ones(rows, 1), mask], dim=1)
    fed = thinker.feed(columns[:, :-1], thought.past, seen[:, :-1], all_layers)
    return fed, ids[:, width:], mask[:, width:]


@torch.no_grad()
def answers_of(thinker: Thinker, thought: Thought, most_tokens: int) -> list[list[int]]:
    """Token ids of the most likely answers behind a thought, one by one, at most so many of each."""
    rows = len(thought.past.mask)
    ids = torch.tensor([thinker.prompt] * rows, device=thinker.marks.device)
    columns = torch.cat([thinker.mark("eot", rows), thinker.embed(ids)], dim=1)
    return _greedy(thinker, thinker.feed(columns, thought.past), most_tokens)


@dataclass(frozen=True)
class Explained:
    """An explicit chain of thought.

    Attributes:
        steps: its text.
        answer_ids: token ids behind the answer prompt; none where the chain never came to it.
        num_tokens: tokens before the answer, those of the prompt included.
    """

    steps: str
    answer_ids: list[int]
    num_tokens: int


@torch.no_grad()
def explained(thinker: Thinker, questions: Sequence[str], most_tokens: int) -> list[Explained]:
    """The most likely chains of thought in words, and the answers that they end in.

    Args:
        thinker: the model.
        questions: texts, padded on the left.
        most_tokens: tokens of chain, prompt and answer at most.
    """
    ids, mask = thinker.padded(thinker.ids(questions), left=True)
    rows = _greedy(thinker, thinker.feed(thinker.embed(ids), mask=mask), most_tokens)
    prompt, found = thinker.prompt, []
    for row in rows:
        starts = range(len(row) - len(prompt) + 1)
        start = next((n for n in starts if row[n : n + len(prompt)] == prompt), len(row))
        behind = min(start + len(prompt), len(row))
        found.append(Explained(thinker.text(row[:start]), row[behind:], max(behind, 1)))
    return found


def _greedy(thinker: Thinker, fed: Fed, most_tokens: int) -> list[list[int]]:
    """Most likely tokens behind what was read, of each row up to its end token."""
    rows: list[list[int]] = [[] for _ in fed.hidden]
    going = set(range(len(rows)))
    for _ in range(most_tokens):
        ids = thinker.logits(fed.hidden[:, -1]).argmax(1)
        for row, token in enumerate(ids.tolist()):
            if token == thinker.end:
                going.discard(row)
            if row in going:
                rows[row].append(token)
        if not going:
            break
        fed = thinker.feed(thinker.embed(ids[:, None]), fed.past)
    return rows
