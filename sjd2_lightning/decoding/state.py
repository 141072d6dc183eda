"""What a batch holds between iterations: tensors on the device that stay at their addresses."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

from torch import Tensor

_Kind = TypeVar("_Kind", bound="Rows")


@dataclass(frozen=True)
class Rows:
    """Tensors with a row for each image of a batch, (R, ...) each; None where a method has no use for one.

    An iteration writes into them and never replaces them, so that a captured graph finds them again.
    """

    def keep(self: _Kind, index: Tensor) -> _Kind:
        """The rows `index` (n,), moved to the front of the same memory: what leaves is lost."""
        for tensor in self._tensors().values():
            tensor[: len(index)] = tensor[index]
        return self.front(len(index))

    def front(self: _Kind, num: int) -> _Kind:
        """The first rows, in the same memory."""
        return replace(self, **{name: tensor[:num] for name, tensor in self._tensors().items()})

    def fill(self: _Kind, other: _Kind) -> None:
        """Takes over the content of a batch of the same shapes."""
        theirs = other._tensors()
        for name, tensor in self._tensors().items():
            tensor.copy_(theirs[name])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Prompts(Rows):
    """What stands in front of the slots; C is 1, or 2 with guidance: a prompt and its empty twin.

    Attributes:
        embeddings: (R, C, P, D) embeddings of the prompts, aligned at their right ends.
        first: (R, C) column of each prompt's first token.
        scales: (R, N) guidance scale of each slot.
        distances: (R, A, N) of slots on several axes of positions; None where they are counted on.
    """

    embeddings: Tensor
    first: Tensor
    scales: Tensor
    distances: Tensor | None = None


@dataclass(frozen=True)
class State(Rows):
    """The slots, N of each row: those of the image, then at least W that nothing is committed to.

    Attributes:
        image: (R,) which image of the batch each row is.
        seeds: (R,) seeds of the images.
        head: (R,) the first slot that is not committed.
        end: (R,) number of slots of the image.
        uncached: (R,) committed slots left of the head that the cache does not hold as they are.
        iteration: (R,) number of iterations so far; the same in every row.
        committed: (R, N) slots that each iteration committed.
        tokens: (R, N) slot ids: committed tokens, then drafts.
        is_code: (R, N) True = a code is drawn here; False = structural, the draft is the token.
        levels: (R, N) noise levels.
        lawless: (R,) the first slot that a pass found no law for, see `law.has_law`; N = none.
        noisy: (R, N, D) normalised noisy embeddings.
        gumbel: (R, N, K) the slots' own Gumbel noise; None also where it is drawn anew in each pass.
        draft_probs: (R, W, K) laws that the drafts of the window were drawn from.
        neighbour: (R, N) slots that first drafts repeat; -1 = none.
        upper: (R, N) slots one row up; -1 = none.
        places: (R, N, 2) row and column of each slot in its image.
    """

    image: Tensor
    seeds: Tensor
    head: Tensor
    end: Tensor
    uncached: Tensor
    iteration: Tensor
    committed: Tensor
    tokens: Tensor
    is_code: Tensor
    levels: Tensor
    lawless: Tensor
    noisy: Tensor | None = None
    gumbel: Tensor | None = None
    draft_probs: Tensor | None = None
    neighbour: Tensor | None = None
    upper: Tensor | None = None
    places: Tensor | None = None
