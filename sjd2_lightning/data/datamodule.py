"""The Lightning data module over shards of image codes, or of pictures that are encoded while training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from sjd2_lightning.data import DataConfig
from sjd2_lightning.data.index import INDEX_NAME, ShardIndex
from sjd2_lightning.data.loader import Batch, CodeDataset, CodeLoader, PictureBatch
from sjd2_lightning.data.places import Place, place
from sjd2_lightning.data.reading import any_caption
from sjd2_lightning.data.sources.emoji import SOURCE as EMOJI
from sjd2_lightning.data.sources.emoji import prepare_emoji
from sjd2_lightning.data.sources.scene_shards import SOURCE as SCENES
from sjd2_lightning.data.sources.scene_shards import held_out_for, prepare_scenes
from sjd2_lightning.data.sources.scenes import Variety
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.image_tokenizer import ImageTokenizer, load_image_tokenizer

__all__ = ["Batch", "CodeDataModule", "PictureBatch"]

logger = logging.getLogger(__name__)


_MOST_TOKENS = (
    12  # of a byte: a token has a byte at least, and no Unicode normalisation (UAX 15) makes more of one
)


class CaptionLimit:
    """Says of a caption what makes it too long for a model and the image behind it.

    Args:
        backbone: the model, of which only layouts and ids are kept.
        layout: layout of the images.

    Raises:
        ValueError: the image and the template alone are too long.
    """

    def __init__(self, backbone: Backbone, layout: ImageLayout) -> None:
        self.backbone, self.layout = backbone.without_weights(), layout
        self.num_positions = backbone.num_positions
        least = backbone.prompt_ids(backbone.shortest_prompt, layout)
        if layout.num_slots + len(least) > self.num_positions:
            raise ValueError(
                f"images of {layout.pixels[1]}x{layout.pixels[0]} pixels take {layout.num_slots:,} tokens, "
                f"the template {len(least)}, and the model has {self.num_positions:,} positions; set a "
                "smaller model.image_size"
            )
        self.sure = (self.num_positions - layout.num_slots - len(least)) // _MOST_TOKENS

    def __call__(self, caption: str) -> str:
        """What the caption has too much of; "" if it fits. Raises ValueError for one that is no prompt."""
        if len(caption.encode()) <= self.sure:
            return ""
        try:
            ids = self.backbone.prompt_ids(caption, self.layout)
        except ValueError as error:
            raise ValueError(f"data.data_dir: a caption is no prompt of this model: {error}") from error
        return self.backbone.excess(ids, self.layout)


class CodeDataModule(L.LightningDataModule):
    """Batches of captioned image codes from ``<data_dir>/{codes,raw}/{train,val}``.

    With a tokenizer, `prepare_data` builds an embedded set's shards when they are missing or stale; shards of
    another source are used as they are. Before anything long starts, missing shards, and codes of another
    tokenizer, codebook or image size than the model's are refused. Pictures of raw shards become codes on the
    training device, by the tokenizer of the model in training.

    Args:
        config: where the shards lie, and how they are read.
        tokenizer: image tokenizer or its folder, for preparing; None uses shards that are there.
        image_size: side of the pictures in pixels, for preparing.
        seed: decides the order of training, with the epoch.

    Raises:
        ValueError: values out of range (all problems at once).
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: ImageTokenizer | str | Path | None = None,
        image_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if found := config.problems():
            raise ValueError("; ".join(f"data.{line}" for line in found))
        self.config, self.tokenizer, self.image_size, self.seed = config, tokenizer, image_size, seed
        self.data_dir: Place = place(config.data_dir)

    def prepare_data(self) -> None:
        """Build missing or stale shards, and warn of damaged ones; runs on one process of a machine."""
        if self.tokenizer is not None and not self.is_foreign():
            self._prepare(self.tokenizer)
        for split in ("train", "val"):
            index = self.index(split)
            for name in index.damaged_shards() if self.config.verify_shards else ():
                logger.warning(
                    "%s is not as it was written; up to %d unusable samples will be skipped "
                    "(data.max_bad_samples). Delete the folder to build it again.",
                    index.folder / name,
                    self.config.max_bad_samples,
                )

    def is_foreign(self) -> bool:
        """Whether shards of another source lie here."""
        train = self.data_dir / self.config.kind / "train"
        return (train / INDEX_NAME).is_file() and _source(train) not in (EMOJI, SCENES)

    def _prepare(self, tokenizer: ImageTokenizer | str | Path) -> None:
        if not isinstance(self.data_dir, Path):
            raise ValueError(f"data.data_dir={self.data_dir}: shards are built in local folders only")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_image_tokenizer(tokenizer)
        num_codes, _ = self._model_facts()
        if num_codes not in (None, tokenizer.num_codes):
            raise ValueError(
                f"data.tokenizer has a codebook of {tokenizer.num_codes}, the model's has {num_codes}; "
                "choose the image tokenizer that belongs to the model"
            )
        coder = tokenizer if self.config.kind == "codes" else None
        if self.config.source == SCENES:
            variety = Variety(self.config.num_nouns, self.config.aligned)
            most = self.config.max_images
            prepare_scenes(
                self.data_dir,
                coder,
                min(self.config.num_scenes, most or self.config.num_scenes),
                size=self.image_size,
                variety=variety,
                held_out_per_category=held_out_for(most),
            )
        else:
            prepare_emoji(
                self.data_dir,
                coder,
                self.config.views,
                size=self.image_size,
                max_images=self.config.max_images,
            )

    def setup(self, stage: str) -> None:
        """Refuse data that do not fit the model the trainer holds."""
        layout = getattr(getattr(self.trainer, "lightning_module", None), "image_layout", None)
        size = None
        if layout is not None:
            size = (layout.height, layout.width) if self.config.kind == "codes" else layout.pixels
        for split in ("train", "val"):
            self.index(split).check_model(*self._model_facts(), size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn pictures into codes with the model's own tokenizer, on its device."""
        if not isinstance(batch, PictureBatch):
            return batch
        tokenizer = self._model_tokenizer()
        if tokenizer is None:
            raise ValueError("data.kind=raw: the model has no image tokenizer; use data=shards")
        module = tokenizer if isinstance(tokenizer, nn.Module) else getattr(tokenizer, "vq", None)
        if isinstance(module, nn.Module) and next(module.parameters()).dtype != torch.float32:
            raise ValueError(
                "data.kind=raw: in half precision the image tokenizer would give other codes; use "
                "trainer.precision=bf16-mixed, or data=shards"
            )
        pixels = batch.images.permute(0, 3, 1, 2).float() / 255
        return Batch(batch.keys, batch.captions, tokenizer.encode(pixels))

    def _model_facts(self) -> tuple[int | None, str | None]:
        """Codebook size and tokenizer identity of the trainer's model, as far as it has them."""
        backbone = getattr(getattr(self.trainer, "lightning_module", None), "backbone", None)
        return getattr(backbone, "num_codes", None), getattr(self._model_tokenizer(), "identity", None)

    def _model_tokenizer(self) -> Any:
        backbone = getattr(getattr(self.trainer, "lightning_module", None), "backbone", None)
        return getattr(backbone, "image_tokenizer", None)

    def index(self, split: str) -> ShardIndex:
        """The checked index of a split's shards.

        Raises:
            ValueError: the shards are missing, or are not of that kind and split.
        """
        index = ShardIndex.load(self.data_dir / self.config.kind / split)
        if (index.meta.kind, index.meta.split) != (self.config.kind, split):
            raise ValueError(
                f"{index.folder} holds {index.meta.kind} shards of split {index.meta.split!r}, "
                f"not {self.config.kind} of {split!r}; correct data.data_dir"
            )
        index.check_files()
        return index

    def train_dataloader(self) -> CodeLoader:
        """Shuffled full batches, another order every epoch, equally many on every rank."""
        return self._loader(
            "train",
            self.config.batch_size,
            num_samples=self.config.num_train_samples,
            drop_last=self.config.drop_last,
        )

    def val_dataloader(self) -> CodeLoader:
        """Every validation sample once over the ranks, in order."""
        return self._loader("val", self.config.val_batch_size)

    def _loader(self, split: str, batch_size: int, **options: Any) -> CodeLoader:
        module = getattr(self.trainer, "lightning_module", None)
        backbone, layout = getattr(module, "backbone", None), getattr(module, "image_layout", None)
        limit = CaptionLimit(backbone, layout) if isinstance(backbone, Backbone) and layout else any_caption
        dataset = CodeDataset(
            self.index(split),
            batch_size=batch_size,
            train=split == "train",
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            shuffle_buffer=self.config.shuffle_buffer,
            max_bad_samples=self.config.max_bad_samples,
            limit=limit,
            **options,
        )
        return CodeLoader(dataset, self.config.num_workers, pin_memory=torch.cuda.is_available())


def _source(folder: Place) -> str:
    """The data set that the shards of a folder are of, whatever their format."""
    with (folder / INDEX_NAME).open("rb") as stream:
        try:
            return str(json.loads(stream.read())["source"])
        except (ValueError, KeyError, TypeError):
            return ShardIndex.load(folder).meta.source  # its error says what to do
