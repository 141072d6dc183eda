"""PickScore: which image people would prefer for a prompt, by a CLIP-H that was tuned on their choices.

Source: Kirstain et al. 2023, arXiv 2305.01569: exp(logit_scale) cos(image, prompt), about 100 times the
cosine. It is chosen over HPSv2 because its release is said to be in the layout of transformers' `CLIPModel`,
and HPSv2's a pickle for a fork of open_clip; neither was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from sjd2_lightning.metrics.features import Images
from sjd2_lightning.metrics.vision import check_network, load_network

KINDS = ("clip",)
FILES = ("preprocessor_config.json", "tokenizer_config.json")


class PickScorer(nn.Module):
    """Embeds images and prompts for PickScore.

    Args:
        folder: release in the layout of transformers, with its image processor and tokenizer.
        source: what the weights are called in reports, such as `OWNER/NAME@REVISION`.
        device: device that the model runs on.

    Raises:
        ValueError: a file is missing, is of another model or cannot be read.
    """

    name = "PickScore"
    metric_name = "pick_score"

    def __init__(self, folder: str | Path, source: str, device: str | torch.device = "cpu") -> None:
        super().__init__()
        check_pickscore(folder)
        self.device = torch.device(device)
        self.model: Any = load_network(CLIPModel, folder, KINDS).to(self.device)
        try:
            self._prepare = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._tokenize = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise ValueError(f"{folder}: image processor or tokenizer cannot be loaded: {error}") from error
        self.context = int(self.model.config.text_config.max_position_embeddings)
        self.source = source

    @property
    def scale(self) -> float:
        """What a cosine is multiplied by."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def embed_images(self, images: Images, batch_size: int = 32) -> Tensor:
        """Unit embeddings (N, D) of uint8 images, (N, h, w, 3) or N times (h, w, 3), of any sizes."""
        parts = []
        for start in range(0, len(images), batch_size):
            batch = [image.permute(2, 0, 1) for image in images[start : start + batch_size]]
            pixels = self._prepare(images=batch, return_tensors="pt", input_data_format="channels_first")
            seen = self.model.vision_model(pixel_values=pixels["pixel_values"].to(self.device))
            parts.append(F.normalize(self.model.visual_projection(seen.pooler_output), dim=-1))
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit embeddings (N, D) of prompts; longer ones are cut behind `context` tokens."""
        parts = []
        for start in range(0, len(captions), batch_size):
            ids = self._tokenize(
                list(captions[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.context,
                return_tensors="pt",
            ).to(self.device)
            read = self.model.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
            parts.append(F.normalize(self.model.text_projection(read.pooler_output), dim=-1))
        return torch.cat(parts).float().cpu()

    def scored(self, cosines: Tensor) -> Tensor:
        """PickScores of cosines of images and prompts."""
        return self.scale * cosines

    def scores(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """PickScore of each image with its own prompt (N,), from unit embeddings (N, D) of both."""
        return self.scored((image_embeds * text_embeds).sum(-1))

    def num_cut(self, captions: Sequence[str]) -> int:
        """Number of different prompts that are longer than the text encoder reads."""
        texts = list(dict.fromkeys(captions))
        return sum(len(ids) > self.context for ids in self._tokenize(texts)["input_ids"])


def check_pickscore(folder: str | Path) -> None:
    """Refuses a folder that is no PickScore; nothing is loaded.

    Raises:
        ValueError: the message names what is missing.
    """
    check_network(folder, KINDS)
    for name in FILES:
        if not (Path(folder) / name).is_file():
            raise ValueError(f"no {name} in {folder}; download the release with its processor and tokenizer")
