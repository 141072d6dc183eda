"""What recipes share that learn a small network from a model's own decodings: parts, and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset

from sjd2_lightning.run.stages import Advance
from sjd2_lightning.training.optimizer import with_one_cycle

Fields = TypeVar("Fields", bound=tuple[Tensor, ...])


class Steps(Protocol):
    """What of a recipe says how many steps there are and how large; see `corrections.CorrectorRecipe`."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def seed(self) -> int: ...


def divided(parts: Sequence[Fields], val_share: float) -> tuple[Fields, Fields]:
    """What trains and what measures: the last parts of several, at least one.

    Args:
        parts: named tuples of tensors, of a batch of images each; at least two.
        val_share: share of the parts that measures.
    """
    num_train = min(len(parts) - 1, round((1 - val_share) * len(parts)))
    kind: Any = type(parts[0])
    train, val = (
        kind(*map(torch.cat, zip(*some, strict=True))) for some in (parts[:num_train], parts[num_train:])
    )
    return train, val


def fit(
    parameters: Iterable[Parameter],
    data: Fields,
    loss_of: Callable[[Fields], Tensor],
    recipe: Steps,
    advance: Advance,
) -> None:
    """Trains by AdamW; the learning rate rises over the first twentieth and falls to zero by a cosine.

    Args:
        parameters: what is trained.
        data: named tuple of tensors, a sample a row.
        loss_of: loss of some rows.
        recipe: number of steps, rows of each, learning rate, and the seed of the order.
        advance: called with the number of steps done.
    """
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.01)
    schedule = with_one_cycle(optimizer, recipe.lr, recipe.steps, 0.05)["lr_scheduler"]["scheduler"]
    rng, kind = torch.Generator().manual_seed(recipe.seed), type(data)
    loader = DataLoader(TensorDataset(*data), recipe.batch, shuffle=True, generator=rng)
    done = 0
    while done < recipe.steps:
        for fields in loader:
            optimizer.zero_grad()
            loss_of(kind(*fields)).backward()
            optimizer.step()
            schedule.step()
            advance(1)
            done += 1
            if done == recipe.steps:
                break
