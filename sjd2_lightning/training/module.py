"""LightningModule: batch -> noise -> backbone -> loss. No maths of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor

from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.training import objective
from sjd2_lightning.training.batch import NoisyCodes
from sjd2_lightning.training.noise import TrainingNoise as TrainingNoise
from sjd2_lightning.training.noise import draw_levels, random_timesteps
from sjd2_lightning.training.objective import OwnLaw, TokenLoss, next_clean_token_loss
from sjd2_lightning.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    plain_states,
    warmup_cosine,
    whole_states,
)
from sjd2_lightning.training.redrafting import Corrections, CorrectorTraining, corrections_of
from sjd2_lightning.training.states import TeacherForced, hidden_of, logits_of, noisy_codes


class CodeBatch(Protocol):
    """What training reads of a batch: captions, and codes (B, height, width)."""

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def image_ids(self) -> Tensor: ...


class SJD2Module(L.LightningModule):
    """Fine-tunes a backbone to predict clean next tokens from noisy ones.

    Args:
        backbone: the model; frozen parts by `optimizer.freeze`.
        noise: noise of training; `enabled=False` gives plain next-token training.
        optimizer: the optimizer and its schedule.
        image_size: (height, width) of the images in pixels.
        prompt_dropout: share of training prompts replaced by the unconditional context, for guidance.
        seed: decides levels, noise and prompt dropout, together with global step and rank.
        save_trained_only: checkpoints hold the weights that are trained, as for a low-rank adapter.
        bucket: lengths of passes are multiples of it: what is compiled for one serves many batches.
        corrector: training of a corrector of drafts beside the objective; the default trains none.

    Raises:
        ValueError: choices of the noise that do not go together, or with the model's adapter.
    """

    IN_STEP: ClassVar[bool] = False  # whether all ranks must take the same passes
    LOGGED = ("train/loss", "val/loss_clean", "val/loss_low", "val/loss_high")

    def __init__(
        self,
        backbone: Backbone,
        noise: TrainingNoise,
        optimizer: OptimizerConfig,
        image_size: tuple[int, int] = (64, 64),
        prompt_dropout: float = 0.1,
        seed: int = 0,
        save_trained_only: bool = False,
        bucket: int = 1,
        corrector: CorrectorTraining | None = None,
    ) -> None:
        super().__init__()
        if found := noise.problems():
            raise ValueError("; ".join(f"noise.{line}" for line in found))
        if backbone.noise_gate is not None and not noise.enabled:
            raise ValueError(
                "noise.enabled=false: the model's adapter acts on noisy tokens and would learn nothing; use "
                "noise=default, or train the weights below it, without the folder adapter/"
            )
        self.strict_loading = not save_trained_only
        self.backbone = backbone
        self.noise = noise
        self.optimizer_config = optimizer
        self.prompt_dropout = prompt_dropout
        self.seed = seed
        self.bucket = bucket
        self.corrector_training = corrector or CorrectorTraining()
        self.image_layout: ImageLayout = backbone.layout(*image_size)
        for name, parameter in backbone.named_parameters():
            if name.startswith(optimizer.freeze):
                parameter.requires_grad_(False)
        names = [name for name, _ in backbone.named_parameters()]
        for prefix in optimizer.freeze:
            if not any(name.startswith(prefix) for name in names):
                raise ValueError(
                    f"optimizer.freeze={prefix}: no parameter's name begins so; one of them is {names[0]}"
                )
        own, width = backbone.corrector, self.corrector_training.width
        if width and (own is None or own.width != width):  # else training goes on with the one it has
            backbone.corrector = DraftCorrector(backbone.hidden_size, width)
        if backbone.corrector is not None:
            backbone.corrector.requires_grad_(width > 0)
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise ValueError(f"optimizer.freeze={list(optimizer.freeze)}: nothing is left to train")

    def on_fit_start(self) -> None:
        # pretrained models come in eval mode, where dropout and activation checkpointing are off
        self.backbone.train()

    @contextmanager
    def whole_backbone(self) -> Iterator[Backbone | None]:
        """The backbone with all of its weights on this rank, to decode; None where they do not fit.

        All ranks must come here.
        """
        yield self.backbone

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves frozen weights out, if that was asked for; the optimizer's states become plain tensors."""
        if (states := checkpoint.get("optimizer_states")) is not None:
            checkpoint["optimizer_states"] = [plain_states(own) for own in states]
        if not self.strict_loading:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the optimizer's states what they were."""
        if (states := checkpoint.get("optimizer_states")) is not None:
            name = self.optimizer_config.name
            checkpoint["optimizer_states"] = [whole_states(own, name) for own in states]

    def _rng(self, purpose: int, index: int) -> torch.Generator:
        """A CPU generator for one batch: resuming at any step finds the noise of that step."""
        key = (self.seed, self.global_rank, purpose, index)
        return torch.Generator().manual_seed(hash(key) % 2**63)

    def _prompts(self, captions: Sequence[str], rng: torch.Generator | None) -> list[list[int]]:
        drop = torch.zeros(len(captions)) if rng is None else torch.rand(len(captions), generator=rng)
        share = 0.0 if rng is None else self.prompt_dropout
        layout = self.image_layout
        rows = [self.backbone.prompt_ids(caption, layout) for caption in captions]
        return [
            self.backbone.unconditional_ids(layout, ids) if drop[row] < share else ids
            for row, ids in enumerate(rows)
        ]

    def _forced(self, batch: CodeBatch, prompts: Sequence[Sequence[int]]) -> TeacherForced:
        return TeacherForced(prompts, batch.image_ids, self.image_layout, self.bucket)

    def losses(
        self, batch: CodeBatch, prompts: Sequence[Sequence[int]], noise: NoisyCodes | None
    ) -> TokenLoss:
        """Next-clean-token loss of a batch in nats a code; a law of clean input shares in the target."""
        sample = self._forced(batch, prompts)
        own_law = None
        if noise is not None and noise.clean_law is not None:
            share = self.noise.consistency * noise.reaches().to(noise.clean_law)
            own_law = OwnLaw(noise.clean_law, share)
        head = self.backbone.image_head() if own_law is None and objective.HAS_CHUNKS else None
        if head is not None and len(head) >= objective.MANY_CODES:
            hidden = hidden_of(self.backbone, sample, noise)
            return objective.chunked_loss(hidden, head, batch.image_ids.flatten(1))
        logits = logits_of(self.backbone, sample, noise)
        return next_clean_token_loss(logits, batch.image_ids.flatten(1), own_law)

    def noise_of(
        self, sample: TeacherForced, levels: Tensor, grid: Tensor, noise: TrainingNoise, rng: torch.Generator
    ) -> NoisyCodes:
        """What the noisy codes of a batch hold; see `noisy_codes`."""
        return noisy_codes(self.backbone, sample, levels, grid, noise, rng, self.IN_STEP)

    def _num_levels(self, rng: torch.Generator, index: int) -> int:
        """Number of levels of a batch; where ranks go in step they draw the same one."""
        if self.IN_STEP:
            rng = torch.Generator().manual_seed(hash((self.seed, 2, index)) % 2**63)
        fewest, most = self.noise.num_levels
        return int(torch.randint(fewest, most + 1, (), generator=rng))

    def training_step(self, batch: CodeBatch, batch_idx: int) -> Tensor:
        # global_step does not move inside gradient accumulation, batch_idx does
        rng = self._rng(0, self.global_step * 1_000_003 + batch_idx)
        prompts = self._prompts(batch.captions, rng)
        noise = None
        if self.noise.enabled:
            # 1. how noisy each code is: a number of levels for the batch, and segments of rising level
            num_levels = self._num_levels(rng, self.global_step * 1_000_003 + batch_idx)
            batch_size, num_codes = batch.image_ids.flatten(1).shape
            levels = draw_levels(batch_size, num_codes, num_levels, self.noise.ramp, rng)
            random_grid = self.noise.random_grid
            grid = random_timesteps(num_levels, rng) if random_grid else self.noise.process.grid(num_levels)
            # 2. what noisy codes hold: x_t, or what decoding's own passes would have made of them
            images = self._forced(batch, prompts)
            noise = self.noise_of(images, levels, grid, self.noise, rng)
        # 3. one pass, and 4. cross-entropy against the clean codes
        loss = self.losses(batch, prompts, noise).total
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.image_ids))
        return (
            loss if self.corrector_training.width == 0 else loss + self._correction_loss(batch, prompts, rng)
        )

    def _correction_loss(
        self, batch: CodeBatch, prompts: Sequence[Sequence[int]], rng: torch.Generator
    ) -> Tensor:
        """That of the corrector, on some of the images; 0 in steps in which it does not learn."""
        assert self.backbone.corrector is not None
        if self.global_step % self.corrector_training.every:
            # ranks that exchange gradients wait for those of all weights
            return torch.stack([p.sum() for p in self.backbone.corrector.parameters()]).sum() * 0
        most = self.corrector_training.images
        sample = TeacherForced(prompts[:most], batch.image_ids[:most], self.image_layout, self.bucket)
        found = self.corrections(sample, rng)
        self.log("train/loss_drafts", found.loss, batch_size=len(sample.prompts))
        self.log("train/right_drafts", found.right, batch_size=len(sample.prompts))
        return found.loss

    def corrections(self, sample: TeacherForced, rng: torch.Generator) -> Corrections:
        """What images say of the corrector; see `corrections_of`."""
        return corrections_of(self.backbone, sample, self.corrector_training, self.noise.enabled, rng)

    def validation_step(self, batch: CodeBatch, batch_idx: int) -> None:
        """Logs the loss of clean input, and of noisy input by the level of the token predicted from.

        `low` are levels up to half of the grid, `high` is the top level; levels follow the ramps of training.
        """
        prompts = self._prompts(batch.captions, None)
        rng = self._rng(1, batch_idx)
        size = len(prompts)
        clean = self.losses(batch, prompts, None).total
        self.log("val/loss_clean", clean, prog_bar=True, sync_dist=True, batch_size=size)
        ramp = replace(self.noise.ramp, clean_share=0.0)
        levels = draw_levels(size, batch.image_ids[0].numel(), self.noise.val_levels, ramp, rng)
        sample = self._forced(batch, prompts)
        grid = self.noise.process.grid(self.noise.val_levels)
        # against the true codes alone: comparable whatever the targets of training
        alone = replace(self.noise, consistency=0.0)
        noise = self.noise_of(sample, levels, grid, alone, rng)
        per_token = self.losses(batch, prompts, noise).per_token
        levels = levels.roll(1, dims=1)  # the token left of a code is what the code is predicted from
        levels[:, 0] = 0
        half = max(1, self.noise.val_levels // 2)
        bands = {"low": (levels > 0) & (levels <= half), "high": levels == self.noise.val_levels}
        for band, chosen in bands.items():
            # weighted by codes: a batch whose ramps miss the band counts nothing
            count = int(chosen.sum())
            loss = per_token[chosen.to(per_token.device)].sum() / max(1, count)
            self.log(f"val/loss_{band}", loss, sync_dist=True, batch_size=count)

    def configure_optimizers(self) -> Any:
        rates = {"backbone.corrector.": self.corrector_training.lr}
        optimizer = build_optimizer(self.named_parameters(), self.optimizer_config, rates)
        num_steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = warmup_cosine(optimizer, self.optimizer_config, num_steps)
        # the name is that of the logged learning rate
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"},
        }
