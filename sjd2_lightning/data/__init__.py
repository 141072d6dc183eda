"""Data: captioned images, shards of image codes, and the loaders that feed training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sjd2_lightning.data.places import place
from sjd2_lightning.run.values import Count, Natural, Share, Within, wrong_values

# read when webdataset is imported: no shell commands as addresses, no rewriting of addresses
os.environ["WDS_SECURE"] = "1"


@dataclass(frozen=True)
class DataConfig:
    """Captioned images: shards of image codes for training, prompts and reference images for measuring.

    Attributes:
        data_dir: folder of the shards, or its address in an object store.
        kind: "codes", or "raw" for pictures that the model's own tokenizer encodes while training.
        prepare: whether missing or stale shards of an embedded set are built before training.
        source: the embedded set that preparing builds.
        num_scenes: number of training scenes, for preparing; emoji do without.
        num_nouns: number of nouns of the scenes, the most everyday first; None for all.
        aligned: whether objects of the scenes have three sizes and lie on a grid; see `scenes.Variety`.
        views: number of views of a training picture, for preparing.
        max_images: number of pictures of each split, for preparing; None for all.
        batch_size: training samples a step on every rank.
        val_batch_size: validation samples a step on every rank.
        num_workers: number of reading processes on every rank; 0 reads in the training process.
        shuffle_buffer: number of samples among which a worker draws its next one.
        drop_last: whether training batches are full only; see `CodeDataset`.
        num_train_samples: number of samples to train on, the first ones; None for all.
        max_bad_samples: number of unusable samples an epoch of a rank may skip before the run stops.
        verify_shards: whether shards are compared with their sha256 before training.
        prompt_dropout: share of training prompts replaced by the unconditional context.
        prompt_file: prompts to measure with; None takes `prompts.json` of own shards, or the held-out names.
        reference_dir: folder of real images for the distances; None takes what `source` holds out.
    """

    data_dir: str
    kind: Literal["codes", "raw"] = "codes"
    prepare: bool = False
    source: Literal["emoji", "scenes"] = "emoji"
    num_scenes: Annotated[int, Within(1, 10**8)] = 20_000
    num_nouns: Annotated[int, Within(12, 64)] | None = None
    aligned: bool = False
    views: Annotated[int, Within(1, 256)] = 4
    max_images: Count | None = None
    batch_size: Count = 32
    val_batch_size: Count = 32
    num_workers: Annotated[int, Within(0, 1024)] = 0
    shuffle_buffer: Natural = 2048
    drop_last: bool = True
    num_train_samples: Count | None = None
    max_bad_samples: Natural = 10
    verify_shards: bool = True
    prompt_dropout: Share = 0.1
    prompt_file: str | None = None
    reference_dir: str | None = None

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        try:
            where = place(self.data_dir)
            if self.prepare and not isinstance(where, Path):
                found.append(f"prepare=True: shards are built in local folders, not in {self.data_dir}")
        except ValueError as error:
            found.append(f"data_dir={error}")
        if self.prompt_file and not Path(self.prompt_file).is_file():
            found.append(
                f"prompt_file={self.prompt_file}: there is no such file; give a .txt or .json of prompts"
            )
        if self.reference_dir and not Path(self.reference_dir).is_dir():
            found.append(
                f"reference_dir={self.reference_dir}: there is no such folder; give a folder of images"
            )
        return found
