"""Recipe of the tiny CLIP: the offline scorer of scenes, which tells them from shuffled copies too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import open_clip
import torch
from safetensors import torch as safetensors
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from sjd2_lightning.data.sources.scenes import (
    ALL,
    CATEGORY_SHARES,
    Scene,
    Variety,
    held_out_scene,
    training_scene,
)
from sjd2_lightning.metrics.alignment import CONFIG_FILE
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.training.optimizer import with_one_cycle
from sjd2_lightning.training.recipes import ClipRecipe

_MEAN = _STD = 0.5  # of the pixels a CLIP sees: maps [0, 1] to [-1, 1]
_GRIDS = (4, 8, 16)  # blocks on a side of the shuffled copies
_HELD_OUT_PER_CATEGORY = 32


class ClipModule(L.LightningModule):
    """A small open_clip CLIP with the contrastive loss of Radford et al. 2021 (their figure 3).

    Captions must also tell their picture from copies of all pictures whose blocks are shuffled (ours; after
    Yuksekgonul et al. 2023, who found that CLIP reads pictures and captions as bags of parts).

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
        image_size: int = 128,
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

    def training_step(self, batch: Pairs, batch_idx: int) -> Tensor:
        with torch.no_grad():  # Radford et al. keep the temperature from passing 100
            self.clip.logit_scale.clamp_(max=float(np.log(100)))
        grid = int(torch.randint(len(_GRIDS), ()))
        images = torch.cat([batch.images, block_shuffled(batch.images, _GRIDS[grid])])
        image_embeds, text_embeds = self.embed(images, batch.captions)
        by_text = self.clip.logit_scale.exp() * text_embeds @ image_embeds.T  # (B, 2 B)
        own = torch.arange(len(by_text), device=by_text.device)
        by_image = by_text[:, : len(by_text)].T
        loss = (F.cross_entropy(by_text, own) + F.cross_entropy(by_image, own)) / 2
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        self._held_out.append(self.embed(batch.images, batch.captions))

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
        steps = int(self.trainer.estimated_stepping_batches)
        return with_one_cycle(optimizer, self.lr, steps, self.recipe.warmup_share)

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


class Pairs(NamedTuple):
    """Pictures (B, 3, size, size) in [0, 1] and their captions."""

    images: Tensor
    captions: list[str]


class SceneBatches(IterableDataset[Pairs]):
    """Endless batches of training scenes; no two of a batch ask for the same.

    A batch without such doubles pushes no picture away from a caption that fits it.

    Args:
        batch_size: pictures that are each other's negatives.
        size: side of the pictures.
        variety: how much scenes differ.
        seed: seed of the scenes.
    """

    def __init__(self, batch_size: int, size: int, variety: Variety, seed: int) -> None:
        self.batch_size, self.size, self.variety, self.seed = batch_size, size, variety, seed

    def __iter__(self) -> Iterator[Pairs]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch: dict[str, Scene] = {}
        for index in count(first, step):
            scene = training_scene(self.seed, index, self.variety)
            batch.setdefault(_wish(scene), scene)
            if len(batch) == self.batch_size:
                yield painted(list(batch.values()), self.size)
                batch.clear()


class ScenePairs(L.LightningDataModule):
    """Training scenes, and for validation held-out ones that ask for different things.

    Args:
        batch_size: pictures that are each other's negatives.
        size: side of the pictures.
        variety: how much scenes differ.
        seed: seed of the scenes.
        num_workers: number of processes of the training loader.
    """

    def __init__(
        self, batch_size: int, size: int, variety: Variety = ALL, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.batches = SceneBatches(batch_size, size, variety, seed)
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Pairs]:
        return DataLoader(self.batches, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Pairs]:
        size, variety = self.batches.size, self.batches.variety
        scenes = [
            held_out_scene(category, self.batches.seed, index, variety)
            for category in CATEGORY_SHARES
            for index in range(_HELD_OUT_PER_CATEGORY)
        ]
        distinct = list({_wish(scene): scene for scene in scenes}.values())
        batches = [painted(distinct[start : start + 64], size) for start in range(0, len(distinct), 64)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def painted(scenes: Sequence[Scene], size: int) -> Pairs:
    """Scenes as pictures of a side and captions."""
    images = torch.from_numpy(np.stack([scene.image(size) for scene in scenes]))
    return Pairs(images.permute(0, 3, 1, 2).float() / 255, [scene.caption for scene in scenes])


def block_shuffled(images: Tensor, grid: int) -> Tensor:
    """Images (B, C, h, w) cut into grid x grid blocks that change places at random."""
    blocks = images.unflatten(-1, (grid, -1)).unflatten(-3, (grid, -1))  # (B, C, grid, rows, grid, columns)
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(blocks.shape[:2], device=images.device).argsort(1)
    blocks = blocks.gather(1, order[..., None, None, None].expand_as(blocks))
    return blocks.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(-2).flatten(-3, -2)


def recall_at(k: int, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Share of images (N, D) whose own caption (N, D) is among the k nearest of all; scalar."""
    similarity = image_embeds @ text_embeds.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    return (rank < k).float().mean()


def _wish(scene: Scene) -> str:
    """What a scene's caption claims, whatever its words."""
    asked = scene.asked
    return repr((sorted(asked.counts), asked.relation, sorted(asked.sizes), asked.ground))


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
