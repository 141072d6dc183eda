"""Problems of arithmetic in the fields of GSM8K-Aug (question, steps, answer): generated, or from a file.

Generated ones are chains of operations modulo a number, worked from left to right: exact, endless, and each
step needs the one before it. One in sixteen is held out, by a hash of its question.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, NamedTuple

from sjd2_lightning.run.files import text_of
from sjd2_lightning.run.values import Within, wrong_values

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_HELD_OUT = 16  # one question in so many
_FIELDS = ("question", "steps", "answer")


class Problem(NamedTuple):
    """One problem.

    Attributes:
        question: text of the question.
        steps: equations that lead to the answer, each as "<<3+4=7>>"; the last one gives the answer.
        answer: text of the answer.
    """

    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def leading_steps(self) -> tuple[str, ...]:
        """The steps but the last, which would give the answer away."""
        return self.steps[:-1]

    @property
    def results(self) -> tuple[str, ...]:
        """What stands behind the equals sign of each step."""
        return tuple(step.strip("<> ").rpartition("=")[2].strip() for step in self.steps)


@dataclass(frozen=True)
class ProblemSource:
    """Where problems come from.

    Attributes:
        num_operations: operations of a generated question, each a step.
        modulus: generated numbers are those below it.
        train_file: JSON-lines file of problems to train on, in place of generated ones.
        test_file: JSON-lines file of held-out problems; both files or none.
    """

    num_operations: Annotated[int, Within(2, 64)] = 4
    modulus: Annotated[int, Within(2, 10_000)] = 5
    train_file: str | None = None
    test_file: str | None = None

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if (self.train_file is None) != (self.test_file is None):
            key = "test_file" if self.test_file is None else "train_file"
            found.append(f"{key}=null: give both files, or set both to null for generated problems")
        found += [
            f"{key}={path}: there is no such file; give a file with an object of {', '.join(_FIELDS)} a line"
            for key, path in (("train_file", self.train_file), ("test_file", self.test_file))
            if path is not None and not Path(path).is_file()
        ]
        return found

    def training(self, seed: int) -> Iterator[Problem]:
        """Endless problems to train on; those of a file come in another order in each round."""
        if self.train_file is None:
            return self._generated(seed, held_out=False)
        return _rounds(read_problems(self.train_file), seed)

    def held_out(self, number: int, seed: int) -> list[Problem]:
        """The first so many problems that training never sees; of generated ones no two are alike.

        Raises:
            ValueError: the file holds fewer.
        """
        if self.test_file is not None:
            found = read_problems(self.test_file)
            if len(found) < number:
                raise ValueError(f"{self.test_file} holds {len(found)} problems; {number} were asked for")
            return found[:number]
        distinct: dict[str, Problem] = {}
        for tries, problem in enumerate(self._generated(seed, held_out=True)):
            distinct[problem.question] = problem
            if len(distinct) == number:
                return list(distinct.values())
            if tries > 20 * number:
                break
        raise ValueError(
            f"there are hardly more than {len(distinct)} held-out questions of num_operations="
            f"{self.num_operations} modulo {self.modulus}, and {number} were asked for; raise one of the two"
        )

    def _generated(self, seed: int, held_out: bool) -> Iterator[Problem]:
        draw = random.Random(f"{seed}:{held_out}")
        drawn = (self._problem(draw) for _ in count())
        return (problem for problem in drawn if is_held_out(problem) == held_out)

    def _problem(self, draw: random.Random) -> Problem:
        """A chain such as "3+4*2-1 mod 5", worked from left to right."""
        value = draw.randrange(self.modulus)
        question, steps = str(value), []
        for _ in range(self.num_operations):
            sign, number = draw.choice("+-*"), draw.randrange(self.modulus)
            result = _OPERATIONS[sign](value, number) % self.modulus
            question += f"{sign}{number}"
            steps.append(f"<<{value}{sign}{number}={result}>>")
            value = result
        return Problem(f"{question} mod {self.modulus}", tuple(steps), str(value))


def is_held_out(problem: Problem) -> bool:
    """Whether a generated problem is one to test on."""
    return hashlib.sha256(problem.question.encode()).digest()[0] % _HELD_OUT == 0


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSON-lines file in the fields of GSM8K-Aug.

    Raises:
        ValueError: a line is no such object; file and line are named.
    """
    found = []
    for number, line in enumerate(text_of(Path(path).read_bytes()).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            question, steps, answer = (fields[name] for name in _FIELDS)
            whole = isinstance(question, str) and isinstance(steps, list) and isinstance(answer, str | int)
            if not whole or not question or not all(isinstance(step, str) for step in steps):
                raise ValueError("question is a text, steps a list of texts, answer a text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number} is no problem ({error}); it must be an object of {', '.join(_FIELDS)}"
            ) from error
        found.append(Problem(question, tuple(steps), str(answer)))
    if not found:
        raise ValueError(f"{path} holds no problems; each line is an object of {', '.join(_FIELDS)}")
    return found


def _rounds(problems: list[Problem], seed: int) -> Iterator[Problem]:
    for turn in count():
        yield from random.Random(f"{seed}:{turn}").sample(problems, len(problems))
