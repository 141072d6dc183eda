"""Recipe of a policy of actions: a teacher from demonstrations, and its distillation (arXiv 2506.13725)."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sjd2_lightning.data.sources.pick_place import Windows, demonstrations, observation_text
from sjd2_lightning.models.policy import ActionPolicy, load_policy
from sjd2_lightning.training.optimizer import with_one_cycle
from sjd2_lightning.training.recipes import ChunkRecipe
from sjd2_lightning.training.states import TeacherForced, logits_of
from sjd2_lightning.training.trajectories import Trajectories, jacobi_trajectories, near_enough

log = logging.getLogger(__name__)
_BETAS, _DECAY = (0.9, 0.95), 0.01
_NUM_HELD_OUT = 60  # demonstrations behind val/loss
_HELD_OUT_SEED = 10_000  # of them, away from those of any training


class ChunkBatch(NamedTuple):
    """B windows of demonstrations.

    Attributes:
        numbers: (B, numbers) observations.
        labels: (B, A, D) codes to learn.
        states: (B, A, D) codes on the way of the teacher's decoding, and `ends` (B, A, D) where it ended; of
            no rows where there is no teacher.
    """

    numbers: Tensor
    labels: Tensor
    states: Tensor
    ends: Tensor


class ChunkModule(L.LightningModule):
    """A policy that learns the next code and, from a teacher, to be right before its inputs are.

    The loss is omega times the cross-entropy of the labels, and KL(q(.|Y*) || q(.|Y)): what the policy says
    behind a state Y of the teacher's trajectory is drawn to what it says itself, without gradient, behind the
    trajectory's end Y*.

    Args:
        recipe: sizes, labels and losses.
        out_dir: folder that `on_train_end` saves for `load_policy`; None saves nothing.
        lr: learning rate of AdamW.

    Raises:
        ValueError: the teacher has other sizes.
    """

    LOGGED = ("train/loss", "val/loss")

    def __init__(self, recipe: ChunkRecipe, out_dir: str | None = None, lr: float = 2e-3) -> None:
        super().__init__()
        self.recipe, self.out_dir, self.lr = recipe, out_dir, lr
        self.policy = ActionPolicy(recipe.sizes)
        if recipe.teacher is not None:
            teacher = load_policy(recipe.teacher)
            if teacher.sizes != recipe.sizes:
                raise ValueError(
                    f"ceed.teacher={recipe.teacher}: its sizes are {teacher.sizes}, ceed.sizes are "
                    f"{recipe.sizes}; make them equal"
                )
            self.policy.load_state_dict(teacher.state_dict())

    def logits(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """(B, A * D, K) logits of every code behind the codes (B, A, D) to its left."""
        sample = TeacherForced(numbers.tolist(), codes, self.policy.chunk)
        return logits_of(self.policy, sample, None)

    def training_step(self, batch: ChunkBatch, batch_idx: int) -> Tensor:
        loss = self.recipe.label_weight * self.label_loss(batch)
        if self.recipe.consistency > 0:
            loss = loss + self.recipe.consistency * self.consistency_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def label_loss(self, batch: ChunkBatch) -> Tensor:
        """Cross-entropy of the labels, nats a code; scalar."""
        logits = self.logits(batch.numbers, batch.labels)
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())

    def consistency_loss(self, batch: ChunkBatch) -> Tensor:
        """KL from the policy behind the ends to that behind the states, nats a code; scalar."""
        with torch.no_grad():
            target = self.logits(batch.numbers, batch.ends).log_softmax(-1)
        found = self.logits(batch.numbers, batch.states).log_softmax(-1)
        return F.kl_div(found, target, reduction="none", log_target=True).sum(-1).mean()

    def validation_step(self, batch: ChunkBatch, batch_idx: int) -> None:
        self.log("val/loss", self.label_loss(batch), prog_bar=True, batch_size=len(batch.labels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.policy.parameters(), self.lr, _BETAS, weight_decay=_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        return with_one_cycle(optimizer, self.lr, steps, self.recipe.warmup_share)

    def on_train_end(self) -> None:
        if self.out_dir is not None and self.trainer.is_global_zero:
            self.policy.save(self.out_dir)


class Chunks(L.LightningDataModule):
    """Windows of demonstrations, which are made here, and with a teacher its trajectories over them.

    Args:
        recipe: how many, and which labels.
        batch_size: windows of a batch.
        seed: seed of demonstrations, order and states.
    """

    def __init__(self, recipe: ChunkRecipe, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        self.recipe, self.batch_size, self.seed = recipe, batch_size, seed

    def setup(self, stage: str) -> None:
        sizes = self.recipe.sizes
        held_out = demonstrations(_NUM_HELD_OUT, sizes.num_steps, sizes.num_bins, _HELD_OUT_SEED)
        self.val_set = ChunkSet(held_out, None, -1, self.seed)
        if stage != "fit":
            return  # a validation follows no teacher
        windows = demonstrations(
            self.recipe.num_demonstrations, sizes.num_steps, sizes.num_bins, self.recipe.data_seed
        )
        teacher = self.recipe.teacher
        followed = None
        if teacher is not None and self.recipe.needs_teacher:
            policy = load_policy(teacher)
            texts = [observation_text(numbers) for numbers in windows.numbers]
            seeds = range(len(texts))
            followed = jacobi_trajectories(policy, texts, seeds, policy.chunk)
        self.train_set = ChunkSet(windows, followed, self.recipe.max_distance, self.seed)

    def train_dataloader(self) -> DataLoader[ChunkBatch]:
        order = torch.Generator().manual_seed(self.seed)
        return self._loader(self.train_set, torch.utils.data.RandomSampler(self.train_set, generator=order))

    def val_dataloader(self) -> DataLoader[ChunkBatch]:
        return self._loader(self.val_set, torch.utils.data.SequentialSampler(self.val_set))

    def _loader(self, data: ChunkSet, order: torch.utils.data.Sampler[int]) -> DataLoader[ChunkBatch]:
        batches = torch.utils.data.BatchSampler(order, self.batch_size, drop_last=False)
        return DataLoader(data, sampler=batches, batch_size=None)


class ChunkSet(Dataset[ChunkBatch]):
    """Windows as batches: an index is a list of rows.

    Args:
        windows: n windows.
        followed: trajectories of the teacher over them; None without one.
        max_distance: see `training.trajectories.near_enough`.
        seed: seed of the states that are drawn.
    """

    def __init__(
        self, windows: Windows, followed: Trajectories | None, max_distance: float, seed: int
    ) -> None:
        self.numbers, self.shown = torch.from_numpy(windows.numbers), torch.from_numpy(windows.codes)
        self.followed, self.rng = followed, torch.Generator().manual_seed(seed)
        self.labels = self.shown
        if followed is not None:
            ends, shown = followed.ends.long(), self.shown.flatten(1)
            near = near_enough(ends, shown, max_distance)
            self.labels = torch.where(near[:, None], ends, shown).view_as(self.shown)
            share = float(near.float().mean())
            log.info("labels: %.0f %% the teacher's, %.0f %% demonstrations", 100 * share, 100 - 100 * share)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: list[int]) -> ChunkBatch:
        index = torch.tensor(rows)
        labels, states, ends = self.labels[index], self.labels[:0], self.labels[:0]
        if self.followed is not None:
            states = self.followed.drawn(index, self.rng).long().view_as(labels)
            ends = self.followed.ends[index].long().view_as(labels)
        return ChunkBatch(self.numbers[index], labels, states, ends)
