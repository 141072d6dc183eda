"""Recipe of the tiny CLIP: the offline scorer, trained on the training concepts of the emoji pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import open_clip
import torch
from safetensors import torch as safetensors
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import PreTrainedTokenizerFast

from sjd2_lightning.data.sources.emoji import EmojiPictures, Picture
from sjd2_lightning.metrics.alignment import CONFIG_FILE
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.training.recipes import ClipRecipe

_MEAN = _STD = 0.5  # of the pixels a CLIP sees: maps [0, 1] to [-1, 1]


class ClipModule(L.LightningModule):
    """A small open_clip CLIP with the contrastive loss of Radford et al. 2021 (their figure 3).

    Args:
        recipe: sizes and regularisation.
        out_dir: folder that `on_train_end` saves for `load_clip_scorer`; None saves nothing.
        image_size: side of the images in pixels.
        lr: learning rate of AdamW.
        weight_decay: decay of matrices; norms, biases and the temperature do not decay.

    Raises:
        ValueError: sizes that do not fit together, all named at once, or no tokenizer in `recipe.text_dir`.
    """

    LOGGED = ("train/loss", "val/recall_at_1", "val/recall_at_5", "val/recall_at_1_by_chance")

    def __init__(
        self,
        recipe: ClipRecipe,
        out_dir: str | None = "weights/tiny/clip",
        image_size: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 0.2,
    ) -> None:
        super().__init__()
        found = recipe.problems()
        if image_size % recipe.patch_size:
            found.append(
                f"patch_size={recipe.patch_size}: must divide the image's side of {image_size} pixels"
            )
        if found:
            raise ValueError("; ".join(f"clip.{line}" for line in found))
        self.tokenizer = _end_marked(recipe.text_dir)
        self.recipe, self.out_dir, self.lr, self.weight_decay = recipe, out_dir, lr, weight_decay
        self.model_cfg: dict[str, Any] = {
            "embed_dim": recipe.embed_dim,
            "vision_cfg": {
                "image_size": image_size,
                "layers": recipe.vision_layers,
                "width": recipe.vision_width,
                "head_width": recipe.head_width,
                "patch_size": recipe.patch_size,
            },
            "text_cfg": {
                "context_length": recipe.context_length,
                "vocab_size": len(self.tokenizer),
                "hf_tokenizer_name": recipe.name,  # open_clip reads the folder's own tokenizer if this is set
                "width": recipe.text_width,
                "heads": recipe.text_width // recipe.head_width,
                "layers": recipe.text_layers,
                "pool_type": "eos",
                "eos_id": self.tokenizer.eos_token_id,
            },
        }
        training_cfg = self.model_cfg["vision_cfg"] | {"patch_dropout": recipe.patch_dropout}
        self.clip = open_clip.CLIP(recipe.embed_dim, training_cfg, self.model_cfg["text_cfg"])
        self.loss = open_clip.ClipLoss()
        self._held_out: list[tuple[Tensor, Tensor]] = []

    def embed(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, D) of images (B, 3, h, w) in [0, 1] and of their captions."""
        ids = self.tokenizer(
            list(captions),
            max_length=self.model_cfg["text_cfg"]["context_length"],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        if self.training:
            specials = torch.tensor(self.tokenizer.all_special_ids)
            dropped = (torch.rand(ids.shape) < self.recipe.text_dropout) & ~torch.isin(ids, specials)
            ids = ids.masked_fill(dropped, self.tokenizer.unk_token_id)
        image_embeds = self.clip.encode_image((images - _MEAN) / _STD, normalize=True)
        return image_embeds, self.clip.encode_text(ids.to(images.device), normalize=True)

    def training_step(self, batch: Picture, batch_idx: int) -> Tensor:
        with torch.no_grad():  # Radford et al. keep the temperature from passing 100
            self.clip.logit_scale.clamp_(max=float(np.log(100)))
        image_embeds, text_embeds = self.embed(batch.image, batch.caption)
        loss = self.loss(image_embeds, text_embeds, self.clip.logit_scale.exp())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Picture, batch_idx: int) -> None:
        self._held_out.append(self.embed(batch.image, batch.caption))

    def on_validation_epoch_end(self) -> None:
        images, texts = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        self._held_out.clear()
        for k in (1, 5):
            self.log(f"val/recall_at_{k}", recall_at(k, images, texts), prog_bar=True)
        self.log("val/recall_at_1_by_chance", 1 / len(texts))

    def configure_optimizers(self) -> Any:
        still = [p for p in self.clip.parameters() if p.ndim < 2]
        decaying = [p for p in self.clip.parameters() if p.ndim >= 2]
        groups: list[dict[str, Any]] = [{"params": decaying}, {"params": still, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.lr,
            total_steps=total + 1,
            pct_start=self.recipe.warmup_share,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self) -> None:
        if self.out_dir is not None and self.trainer.is_global_zero:
            self.save_clip(self.out_dir)

    def save_clip(self, folder: str | Path) -> None:
        """Writes what `load_clip_scorer(folder)` and open_clip's "local-dir:" read: configuration, fp16
        weights and the text tokenizer."""
        target = Path(folder)
        self.tokenizer.save_pretrained(target)
        preprocess = {"mean": [_MEAN] * 3, "std": [_STD] * 3, "interpolation": "bicubic"}
        config = {"name": self.recipe.name, "model_cfg": self.model_cfg, "preprocess_cfg": preprocess}
        write_whole(target / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        weights = {key: value.half().cpu().contiguous() for key, value in self.clip.state_dict().items()}
        write_whole(target / "open_clip_model.safetensors", safetensors.save(weights))


class EmojiPairs(L.LightningDataModule):
    """One jittered picture of every training concept an epoch; validation on one of every held-out concept.

    A batch never holds a concept twice, so no picture is pushed away from a caption that fits it.

    Args:
        batch_size: pictures that are each other's negatives.
        size: side of the pictures.
        seed: decides order, choice and jitter.
        num_workers: number of processes of the training loader.
    """

    def __init__(self, batch_size: int = 256, size: int = 64, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.size, self.seed, self.num_workers = batch_size, size, seed, num_workers

    def train_dataloader(self) -> DataLoader[Picture]:
        pictures = EmojiPictures("train", self.size, self.seed)
        order = OnePerConcept(pictures, self.seed)
        if self.batch_size > len(order):
            raise ValueError(
                f"batch_size={self.batch_size} exceeds the {len(order)} training concepts; lower it"
            )
        return DataLoader(
            pictures, self.batch_size, sampler=order, drop_last=True, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[Picture]:
        pictures = EmojiPictures("val", self.size)
        first = [members[0] for members in _by_concept(pictures).values()]
        return DataLoader(Subset(pictures, first), batch_size=64)


class OnePerConcept(Sampler[int]):
    """Indices of one picture a concept, in an order and choice drawn anew for each epoch (ours)."""

    def __init__(self, pictures: EmojiPictures, seed: int) -> None:
        self.pictures = pictures
        self.members = list(_by_concept(pictures).values())
        self.seed = seed

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.pictures.epoch])
        for concept in rng.permutation(len(self.members)):
            yield int(rng.choice(self.members[concept]))

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch: draws another order, another choice and another jitter."""
        self.pictures.epoch = epoch


def recall_at(k: int, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Share of images (N, D) whose own caption (N, D) is among the k nearest of all; scalar."""
    similarity = image_embeds @ text_embeds.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    return (rank < k).float().mean()


def _by_concept(pictures: EmojiPictures) -> dict[str, list[int]]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(pictures.items):
        members[item.concept].append(index)
    return members


def _end_marked(text_dir: str) -> PreTrainedTokenizerFast:
    """The tokenizer, made to end every text with its end token: that is where the text is pooled."""
    if not (Path(text_dir) / "tokenizer.json").is_file():
        raise ValueError(
            f"no tokenizer.json in text_dir={text_dir}; train the tiny backbone first or name another"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text_dir)
    missing = [key for key in ("eos_token", "pad_token", "unk_token") if getattr(tokenizer, key) is None]
    if missing:
        raise ValueError(
            f"the tokenizer in text_dir={text_dir} has no {', '.join(missing)}; train it with them"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    return tokenizer
