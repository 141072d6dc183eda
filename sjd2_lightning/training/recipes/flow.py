"""Recipe of a TarFlow over pictures of scenes, conditioned on text vectors of a CLIP (arXiv 2412.06329)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sjd2_lightning.data.sources.scenes import ALL, Variety, training_scene
from sjd2_lightning.metrics.alignment import CLIPScorer
from sjd2_lightning.models.tarflow import TarFlow, bits_per_dim, flow_loss
from sjd2_lightning.training.optimizer import with_one_cycle
from sjd2_lightning.training.recipes import FlowRecipe
from sjd2_lightning.training.recipes.clip import Pairs

_BETAS, _DECAY = (0.9, 0.95), 1e-4  # of the released training
_NUM_CAPTIONS = 512  # whose mean vector stands in for a dropped one


class FlowModule(L.LightningModule):
    """A TarFlow with its likelihood as the loss.

    Args:
        recipe: sizes, and how prompts are dropped.
        scorer: its text encoder gives the vectors of prompts.
        out_dir: folder that `on_train_end` saves for `load_tarflow`; None saves nothing.
        lr: learning rate of AdamW.
        variety: how much the scenes differ.

    Raises:
        ValueError: sizes that do not fit together or to the text encoder.
    """

    LOGGED = ("train/loss", "val/bits_per_dim")

    def __init__(
        self,
        recipe: FlowRecipe,
        scorer: CLIPScorer,
        out_dir: str | None = None,
        lr: float = 2e-3,
        variety: Variety = ALL,
    ) -> None:
        super().__init__()
        if found := recipe.problems():
            raise ValueError("; ".join(f"tarflow.{line}" for line in found))
        self.recipe, self.out_dir, self.lr = recipe, out_dir, lr
        self.flow = TarFlow(recipe.sizes)
        self._embed = scorer.embed_captions
        captions = [training_scene(0, index, variety).caption for index in range(_NUM_CAPTIONS)]
        mean = self._embed(captions).mean(0)
        if len(mean) != (width := recipe.sizes.text_width):
            raise ValueError(
                f"tarflow.sizes.text_width={width}: the vectors of {scorer.name} have {len(mean)} numbers"
            )
        self.flow.dropped_text.copy_(mean)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """(B, D) vectors of captions; while training some are dropped."""
        vectors = self._embed(captions).to(self.device)
        if self.training:
            dropped = torch.rand(len(vectors), 1, device=self.device) < self.recipe.prompt_dropout
            vectors = torch.where(dropped, self.flow.dropped_text, vectors)
        return vectors

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        loss = flow_loss(*self.flow(self.flow.noisy(batch.images), self.texts(batch.captions)))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        noise = torch.Generator(self.device).manual_seed(batch_idx)  # the same at every validation
        pixels = self.flow.noisy(batch.images, noise)
        bits = bits_per_dim(flow_loss(*self.flow(pixels, self.texts(batch.captions))))
        self.log("val/bits_per_dim", bits, prog_bar=True, batch_size=len(pixels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.flow.parameters(), self.lr, _BETAS, weight_decay=_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        return with_one_cycle(optimizer, self.lr, steps, self.recipe.warmup_share)

    def on_train_end(self) -> None:
        if self.out_dir is not None and self.trainer.is_global_zero:
            self.flow.save(self.out_dir)
