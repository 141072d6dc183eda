"""Recipe of the tiny image tokenizer: a small VQModel trained on the emoji pictures."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from diffusers import VQModel
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio

from sjd2_lightning.data.sources.emoji import EmojiPictures, Picture
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer
from sjd2_lightning.training.recipes import TokenizerRecipe


class TokenizerModule(L.LightningModule):
    """VQ autoencoder with L1 + L2 loss (VQ-VAE, van den Oord et al. 2017, eq. 3).

    A codebook that starts at random on trained latents collapses at this budget, so the first
    `warmup_steps` train without quantisation, k-means on their latents starts the codebook, and codes that
    no latent chose for `revive_every` steps are moved onto random latents.

    Args:
        recipe: sizes.
        lr: learning rate.
        out_dir: folder that gets the tokenizer when training ends.
    """

    uses: Tensor

    def __init__(
        self, recipe: TokenizerRecipe, lr: float = 2e-3, out_dir: str = "weights/tiny/tokenizer"
    ) -> None:
        super().__init__()
        channels, patch = recipe.channels, recipe.patch
        levels = len(channels)
        vq = VQModel(
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=channels,
            latent_channels=channels[-1],
            vq_embed_dim=recipe.code_dim,
            num_vq_embeddings=recipe.num_codes,
            norm_num_groups=8,
            # attention would let far pixels change a patch's code, and code sequences harder to predict
            mid_block_add_attention=False,
        )
        self.tokenizer = VQImageTokenizer(vq, recipe.isolate_patches)
        self.recipe, self.lr, self.out_dir = recipe, lr, out_dir
        self.register_buffer("uses", torch.zeros(recipe.num_codes), persistent=False)
        self.recent: list[Tensor] = []

    def training_step(self, batch: Picture, batch_idx: int) -> Tensor:
        images = batch.image
        latents = self.tokenizer.latents(images)
        if self.global_step < self.recipe.warmup_steps:
            self.recent = [*self.recent[-29:], latents.detach()]
            decoded, vq_loss = self.tokenizer.pixels(latents), latents.new_zeros(())
        else:
            self._keep_codebook_alive(latents.detach())
            quantised, vq_loss, (_, _, ids) = self.tokenizer.vq.quantize(latents)
            self.uses += torch.bincount(ids, minlength=len(self.uses))
            decoded = self.tokenizer.pixels(quantised)
        error = decoded - images
        loss = error.abs().mean() + 2 * error.square().mean() + vq_loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _keep_codebook_alive(self, latents: Tensor) -> None:
        codebook = self.tokenizer.vq.quantize.embedding.weight
        if self.recent:
            vectors = torch.cat(self.recent).movedim(1, -1).flatten(0, -2)
            vectors = vectors[torch.randperm(len(vectors))[:40_000]]
            centres, _ = kmeans2(vectors.cpu().numpy(), len(codebook), iter=15, minit="++", seed=0)
            codebook.copy_(torch.from_numpy(centres).to(codebook))
            self.recent = []
        elif (
            self.global_step % self.recipe.revive_every == 0
            and self.global_step < 0.8 * self.trainer.max_steps
        ):
            dead = self.uses < 1
            pool = latents.movedim(1, -1).flatten(0, -2)
            codebook[dead] = pool[torch.randint(len(pool), (int(dead.sum()),), device=pool.device)]
            self.log("train/dead_codes", dead.sum().float())
            self.uses.zero_()

    def validation_step(self, batch: Picture, batch_idx: int) -> None:
        decoded = self.tokenizer.decode(self.tokenizer.encode(batch.image))
        psnr = peak_signal_noise_ratio(decoded, batch.image, data_range=1.0, dim=(1, 2, 3))
        self.log("val/psnr", psnr, prog_bar=True, batch_size=len(decoded))
        self.log("val/l1", F.l1_loss(decoded, batch.image), batch_size=len(decoded))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=total + 1, pct_start=0.05
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.tokenizer.save(self.out_dir)


class EmojiPictureData(L.LightningDataModule):
    """Jittered training pictures and canonical held-out ones."""

    def __init__(self, batch_size: int = 16, size: int = 64, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.size, self.seed, self.num_workers = batch_size, size, seed, num_workers

    def train_dataloader(self) -> DataLoader[Picture]:
        pictures = EmojiPictures("train", self.size, self.seed)
        pictures.epoch = self.trainer.current_epoch if self.trainer else 0
        return DataLoader(
            pictures,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed + pictures.epoch),
        )

    def val_dataloader(self) -> DataLoader[Picture]:
        return DataLoader(EmojiPictures("val", self.size), 64)
