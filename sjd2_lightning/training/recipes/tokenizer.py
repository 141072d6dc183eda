"""Recipe of the small image tokenizers: a VQModel trained on the pictures of an embedded set."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from diffusers import VQModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.image import peak_signal_noise_ratio

from sjd2_lightning.data import DataConfig
from sjd2_lightning.data.sources.emoji import EmojiPictures, Picture
from sjd2_lightning.data.sources.scene_shards import SOURCE as SCENES
from sjd2_lightning.data.sources.scene_shards import SceneSet
from sjd2_lightning.data.sources.scenes import Variety
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer, load_image_tokenizer
from sjd2_lightning.training.recipes import TokenizerRecipe

_HELD_OUT_SCENES = 20  # of each category


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

    LOGGED = ("train/loss", "val/psnr", "val/l1")

    uses: Tensor

    def __init__(
        self, recipe: TokenizerRecipe, lr: float = 2e-3, out_dir: str = "weights/tiny/tokenizer"
    ) -> None:
        super().__init__()
        if recipe.start is None:
            self.tokenizer = _new_tokenizer(recipe)
        else:
            self.tokenizer = load_image_tokenizer(recipe.start)
            self.tokenizer.vq.decoder.requires_grad_(True)
            self.tokenizer.vq.post_quant_conv.requires_grad_(True)
        self.recipe, self.lr, self.out_dir = recipe, lr, out_dir
        self.register_buffer("uses", torch.zeros(recipe.num_codes), persistent=False)
        self.recent: list[Tensor] = []

    def training_step(self, batch: Picture, batch_idx: int) -> Tensor:
        images = batch.image
        if self.recipe.start is not None:
            ids = self.tokenizer.encode(images)
            return self._loss(self.tokenizer.decoded(ids), images, images.new_zeros(()))
        latents = self.tokenizer.latents(images)
        if self.global_step < self.recipe.warmup_steps:
            self.recent = [*self.recent[-29:], latents.detach()]
            decoded, vq_loss = self.tokenizer.pixels(latents), latents.new_zeros(())
        else:
            self._keep_codebook_alive(latents.detach())
            quantised, vq_loss, (_, _, ids) = self.tokenizer.vq.quantize(latents)
            self.uses += torch.bincount(ids, minlength=len(self.uses))
            decoded = self.tokenizer.pixels(quantised)
        return self._loss(decoded, images, vq_loss)

    def _loss(self, decoded: Tensor, images: Tensor, vq_loss: Tensor) -> Tensor:
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
            codebook.copy_(kmeans(vectors, len(codebook)))
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
        learned = [value for value in self.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=total + 1, pct_start=0.05
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.tokenizer.save(self.out_dir)


def _new_tokenizer(recipe: TokenizerRecipe) -> VQImageTokenizer:
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
    return VQImageTokenizer(vq, recipe.isolate_patches)


def kmeans(vectors: Tensor, number: int, num_rounds: int = 15) -> Tensor:
    """Centres (number, C) of vectors (N, C): k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds.

    scipy's start compares every vector with every centre chosen so far, minutes at thousands of centres.
    """
    generator = torch.Generator().manual_seed(0)
    centres = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    gaps = (vectors - centres).square().sum(1)
    for _ in range(number - 1):
        weights = gaps.cpu() if gaps.sum() > 0 else torch.ones(len(gaps))
        new = vectors[torch.multinomial(weights, 1, generator=generator)]
        gaps = gaps.minimum((vectors - new).square().sum(1))
        centres = torch.cat([centres, new])
    for _ in range(num_rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in vectors.split(4096)])
        counts = torch.bincount(nearest, minlength=number)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


class ScenePictures(Dataset[Picture]):
    """Scenes of one split as pictures."""

    def __init__(self, scenes: SceneSet) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes.records)

    def __getitem__(self, index: int) -> Picture:
        scene = self.scenes.scene(index)
        image = torch.from_numpy(scene.image(self.scenes.size).copy())
        return Picture(image.permute(2, 0, 1).float() / 255, scene.caption, scene.key)


class PictureData(L.LightningDataModule):
    """Training pictures and held-out ones of an embedded set; emoji are jittered anew in every epoch.

    Args:
        data: which set, how many of its scenes, and the batch size.
        size: side of the pictures in pixels.
        seed: decides order, scenes and jitter.
    """

    def __init__(self, data: DataConfig, size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.data, self.size, self.seed = data, size, seed

    def _pictures(self, split: str) -> EmojiPictures | ScenePictures:
        if self.data.source == SCENES:
            number = self.data.num_scenes if split == "train" else _HELD_OUT_SCENES
            variety = Variety(self.data.num_nouns, self.data.aligned)
            return ScenePictures(SceneSet(split, self.seed, number, self.size, variety))
        return EmojiPictures(split, self.size, self.seed)

    def train_dataloader(self) -> DataLoader[Picture]:
        pictures, epoch = self._pictures("train"), self.trainer.current_epoch if self.trainer else 0
        if isinstance(pictures, EmojiPictures):
            pictures.epoch = epoch
        return DataLoader(
            pictures,
            self.data.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.data.num_workers,
            generator=torch.Generator().manual_seed(self.seed + epoch),
        )

    def val_dataloader(self) -> DataLoader[Picture]:
        return DataLoader(self._pictures("val"), 64)
