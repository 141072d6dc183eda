"""CLIP score over open_clip: how well an image fits its caption.

Source: Hessel et al. 2021 (CLIPScore), with the factor 100 that the text-to-image field reports:
100 * max(cos(image, caption), 0). The number means something only next to the model's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from sjd2_lightning.metrics.features import Images

CONFIG_FILE = "open_clip_config.json"


class CLIPScorer:
    """One CLIP: embeds images and captions, whose cosines are scores.

    Args:
        model: an open_clip model; put into evaluation mode.
        preprocess: evaluation transform of the model, PIL image -> (3, h, w).
        tokenize: tokenizer of the model, captions -> token ids (B, context).
        name: name of the weights; part of every metric's name.
        device: device that the model runs on.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        name: str,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        self.preprocess = preprocess
        self.tokenize = tokenize
        self.name = name
        # tokens that the text encoder reads at most, 0 where the tokenizer does not say
        self.context = int(getattr(tokenize, "context_length", None) or 0)
        self._control = _control_names(tokenize)

    @property
    def metric_name(self) -> str:
        return f"clip_score_{self.name}"

    def scored(self, cosines: Tensor) -> Tensor:
        """Scores of cosines of images and captions."""
        return clip_scores(cosines)

    @torch.no_grad()
    def embed_images(self, images: Images, batch_size: int = 64) -> Tensor:
        """Unit embeddings (N, D) of uint8 images, (N, h, w, 3) or N times (h, w, 3).

        Raises:
            ValueError: an image is not uint8 (h, w, 3).
        """
        parts = []
        for start in range(0, len(images), batch_size):
            prepared = [self.preprocess(_pil(image)) for image in images[start : start + batch_size]]
            parts.append(self.model.encode_image(torch.stack(prepared).to(self.device), normalize=True))
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit embeddings (N, D) of captions, in which names of control tokens are words like others."""
        parts = []
        for start in range(0, len(captions), batch_size):
            ids = self.tokenize(self._as_text(captions[start : start + batch_size]))
            parts.append(self.model.encode_text(ids.to(self.device), normalize=True))
        return torch.cat(parts).float().cpu()

    def num_cut(self, captions: Sequence[str]) -> int:
        """Number of different captions that are longer than the text encoder reads."""
        if not self.context:
            return 0
        tokenize: Any = self.tokenize
        # what is cut here has more tokens there, whatever the tokenizer adds at the end
        longer = self.context + 8
        pad = tokenize([""], context_length=longer)[0, -2]
        texts = self._as_text(list(dict.fromkeys(captions)))
        here, there = (
            (tokenize(texts, context_length=length) != pad).sum(1) for length in (self.context, longer)
        )
        return int((here < there).sum())

    def _as_text(self, captions: Sequence[str]) -> list[str]:
        """The captions, with a space inside each name of a control token."""
        return [self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) for text in captions]


def _control_names(tokenize: Any) -> re.Pattern[str]:
    """What the control tokens of a tokenizer of open_clip are called: its own kind's, or transformers'."""
    names = set(getattr(getattr(tokenize, "tokenizer", None), "all_special_tokens", ()))
    names |= {tokenize.decoder[token] for token in getattr(tokenize, "all_special_ids", ())}
    names = {name for name in names if len(name) > 1}
    return re.compile("|".join(map(re.escape, sorted(names, reverse=True))) or r"(?!)", re.IGNORECASE)


def clip_scores(cosines: Tensor) -> Tensor:
    """100 * max(cos, 0) of cosines of any shape (Hessel et al. 2021, eq. 1)."""
    return cosines.clamp(min=0).mul(100)


def own_scores(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """100 * max(cos, 0) of each image with its own caption (N,), from unit embeddings (N, D) of both.

    Source: Hessel et al. 2021, eq. 1.
    """
    return clip_scores((image_embeds * text_embeds).sum(-1))


def scores_of_others(
    image_embeds: Tensor,
    text_embeds: Tensor,
    captions: Sequence[str],
    scored: Callable[[Tensor], Tensor] = clip_scores,
) -> Tensor:
    """CLIP score of each image averaged over all captions that differ from its own, (N,) (ours).

    What shuffled captions score in the mean, without the noise of one shuffle.

    Args:
        image_embeds, text_embeds: (N, D) unit embeddings of images and of their captions.
        captions: the N captions.
        scored: scores of cosines.

    Raises:
        ValueError: all captions are equal.
    """
    _, label = np.unique(np.array(captions), return_inverse=True)
    labels = torch.from_numpy(label)
    if labels.max() == 0:
        raise ValueError("all captions are equal, so no image has another's; add images of other captions")
    means = []
    for rows, own in zip(image_embeds.split(1024), labels.split(1024), strict=True):
        other = own[:, None] != labels[None, :]
        means.append((scored(rows @ text_embeds.T) * other).sum(1) / other.sum(1))
    return torch.cat(means)


def load_clip_scorer(
    source: str | Path, pretrained: str | Path | None = None, device: str | torch.device = "cpu"
) -> CLIPScorer:
    """A scorer from a local folder, a hub name, or an open_clip architecture with weights.

    Args:
        source: a folder (open_clip_config.json, weights and, if it names one, a tokenizer: never any
            network), "hf-hub:owner/model", or an architecture such as "ViT-B-32".
        pretrained: weights of an architecture: a file, read with weights_only, or open_clip's tag of the
            weights ("openai"), which is downloaded when it is not cached.
        device: device that the model runs on.

    Raises:
        ValueError: the folder is incomplete, the architecture unknown, the weights missing or unreadable.
    """
    name = check_clip(source, pretrained)
    identifier = f"local-dir:{source}" if Path(source).is_dir() else str(source)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            identifier, pretrained=None if pretrained is None else str(pretrained), weights_only=True
        )
        tokenize = open_clip.get_tokenizer(identifier)
    except Exception as error:  # open_clip, safetensors, the unpickler and the hub raise many kinds
        raise ValueError(
            f"CLIP {identifier} (pretrained={pretrained}) cannot be loaded: {error}; check the files, or "
            f"fetch the weights on a machine with a network and give their path"
        ) from error
    return CLIPScorer(model, preprocess, tokenize, name, device)


def check_clip(source: str | Path, pretrained: str | Path | None = None) -> str:
    """Name of a scorer in reports, from what names it; nothing is loaded.

    Args:
        source, pretrained: as for `load_clip_scorer`.

    Raises:
        ValueError: the folder is incomplete, the architecture unknown or the weights missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _check_identifier(str(source), pretrained)
    if pretrained is not None:
        raise ValueError(f"pretrained={pretrained} has no meaning for the folder {folder}; leave it out")
    return _check_folder(folder)


def _check_folder(folder: Path) -> str:
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise ValueError(f"no {CONFIG_FILE} in {folder}; train one with experiment=tiny_clip")
    if not any(path.suffix in {".safetensors", ".bin", ".pth"} for path in folder.iterdir()):
        raise ValueError(f"no weights (*.safetensors) in {folder}, open_clip would draw them; add the file")
    try:
        return str(json.loads(config.read_text()).get("name", folder.name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config} is not JSON ({error}); write the folder anew") from error


def _check_identifier(identifier: str, pretrained: str | Path | None) -> str:
    if identifier.startswith("hf-hub:"):
        return identifier.removeprefix("hf-hub:").replace("/", "-")
    if identifier.replace("/", "-") not in open_clip.list_models():
        raise ValueError(f"{identifier} is no folder, no hf-hub: name and no architecture of open_clip")
    if pretrained is None:
        raise ValueError(f"{identifier} without weights is random; set pretrained to a weight file or a tag")
    if "/" in str(pretrained) and not Path(pretrained).is_file():
        raise ValueError(f"CLIP weights {pretrained} do not exist; correct the path")
    weights = Path(pretrained).stem if Path(pretrained).is_file() else str(pretrained)
    return f"{identifier.replace('/', '-')}-{weights}"


def _pil(image: Tensor) -> Image.Image:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"CLIP score needs uint8 images (h, w, 3) in 0..255; got {image.dtype} {tuple(image.shape)}"
        )
    return Image.fromarray(image.cpu().numpy())
