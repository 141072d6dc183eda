"""Groups of the configuration that are no class's own dataclass, and what they are made of.

Values live in `conf/`; there are no defaults here.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sjd2_lightning.data.sources.coco import CocoProtocol
from sjd2_lightning.decoding.config import MOST_SLOTS
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.run.values import MOST

Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
NaturalOrAll = Annotated[int, Field(ge=-1, le=MOST)]  # -1: without limit
Slots = Annotated[int, Field(ge=1, le=MOST_SLOTS)]
Side = Annotated[int, Field(ge=1, le=2**14)]  # of an image in pixels
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(path: str | Path) -> Path:
    """A path as it is if it exists, else where the checkout or the installed package ships it."""
    roots = (Path(), _PACKAGE.parent, _PACKAGE)
    return next((root / path for root in roots if (root / path).exists()), Path(path))


_MOST_SHOWN = 12


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Names the known name that is close, or else all of them, or some where they are many."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    shown = [*sorted(known)[:_MOST_SHOWN], *(["..."] if len(known) > _MOST_SHOWN else [])]
    return f"known here: {', '.join(shown)}"


def several(problems: list[str]) -> PydanticCustomError:
    """One validation error that carries several problems, each a line that starts with its key."""
    lines = "\n".join(problem.replace("\n", " ") for problem in problems)
    return PydanticCustomError("several", "{lines}", {"lines": lines})


Value = TypeVar("Value")


def sound(value: Value) -> Value:
    """A dataclass of the package as it is, if its own `problems()` finds none."""
    if found := value.problems():  # type: ignore[attr-defined]
        raise several(found)
    return value


class Group(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, str_min_length=1, str_max_length=4096
    )

    def problems(self) -> list[str]:
        """What is wrong between fields that are right each by itself; a line each, starting with the key."""
        return []

    @model_validator(mode="after")
    def _no_problems(self) -> Group:
        if found := self.problems():
            raise several(found)
        return self


class WandbConfig(Group):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(max_length=128, pattern=r"^[^/\\#?%:]+$")]
    entity: str | None
    name: Annotated[str, Field(max_length=128)] | None
    group: Annotated[str, Field(max_length=128)] | None
    tags: tuple[Annotated[str, Field(max_length=64)], ...]


class MlflowConfig(Group):
    """MLflow."""

    tracking_uri: str | None
    experiment: str | None
    name: str | None


class LoggerConfig(Group):
    """Where metrics go beside the console."""

    csv: bool
    wandb: WandbConfig | None
    tensorboard: bool
    mlflow: MlflowConfig | None

    def problems(self) -> list[str]:
        """A logger whose package is not installed."""
        wanted = {"tensorboard": self.tensorboard, "mlflow": self.mlflow is not None}
        return [
            f"{name}: the package {name} is not installed; `pip install 'sjd2-lightning[{name}]'`, or use "
            "logger=csv"
            for name, is_wanted in wanted.items()
            if is_wanted and importlib.util.find_spec(name) is None
        ]


class MetricsConfig(Group):
    """What images are measured with."""

    features: tuple[Literal["EffNetLite0", "InceptionCleanFID"], ...]
    inception_dir: str | None
    allow_download: bool
    clip: str | None
    clip_pretrained: str | None
    dinov2: str | None
    cmmd: str | None
    pickscore: str | None
    judge: bool
    num_resamples: Annotated[int, Field(ge=1, le=10**6)]
    num_distance_resamples: Annotated[int, Field(ge=0, le=10**5)]
    min_images: Annotated[int, Field(ge=2, le=MOST)]
    nearest_k: Count | None
    protocol: Annotated[CocoProtocol, AfterValidator(sound)] | None
    cache_dir: str | None

    @property
    def extractors(self) -> tuple[str, ...]:
        """Names of all extractors of distances but CMMD's."""
        return (*self.features, *(["DINOv2"] if self.dinov2 is not None else []))

    @property
    def has_distances(self) -> bool:
        """Whether a distance to real images is asked for."""
        return bool(self.extractors) or self.cmmd is not None

    def problems(self) -> list[str]:
        """A CLIP folder that is not there."""
        is_folder = self.clip is not None and "/" in self.clip and not self.clip.startswith("hf-hub:")
        if is_folder and not shipped(str(self.clip)).is_dir():
            return [
                f"clip={self.clip}: there is no such folder; train it with "
                "`sjd2 train experiment=tiny_clip`, or set clip to null"
            ]
        return []


class CheckpointConfig(Group):
    """Lightning's ModelCheckpoint in `<run_dir>/checkpoints`, and `last.ckpt` beside it."""

    every_n_train_steps: Count | None
    monitor: str | None
    mode: Literal["min", "max"]
    save_top_k: NaturalOrAll

    def problems(self) -> list[str]:
        """More than the newest checkpoint without a measure of which are best."""
        if self.monitor is None and self.save_top_k > 1:
            return [
                f"save_top_k={self.save_top_k}: needs callbacks.checkpoint.monitor, the metric that says "
                "which are best; without it 1 keeps the newest and -1 all"
            ]
        return []


class SamplingConfig(Group):
    """Decoding of fixed prompts during validation."""

    num_prompts: Count
    batch_size: Count
    every_n_validations: Count


class CallbacksConfig(Group):
    """What happens beside training steps."""

    sampling: SamplingConfig | None
    checkpoint: CheckpointConfig | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    nonfinite: Literal["stop", "skip"] | None
    loss_spike: Annotated[float, Field(gt=1, le=1e6)] | None
    lr_monitor: bool
    progress_bar: Literal["rich", "tqdm"] | None
    extra: list[dict[str, Any]]


class AutoWindowConfig(Group):
    """How a window of `auto` is chosen; see `evaluation.auto_window`."""

    windows: Annotated[tuple[Slots, ...], Field(min_length=1)]
    repeats: Annotated[int, Field(ge=1, le=10_000)]


class DecodingDefaults(Group):
    """What methods share: they take it by interpolation, see conf/method/base.yaml."""

    window: Slots | Literal["auto"]
    num_levels: Annotated[int, Field(ge=0, le=1000)] | None
    draft_init: Literal["random", "gumbel", "repeat_left", "repeat_above"] | None
    engine: Literal["auto", "eager", "compiled", "graphs"]
    attention: Literal["auto", "dense", "flex"]
    invariant: bool
    window_shape: Annotated[int, Field(ge=0, le=MOST_SLOTS)]
    sampling: Annotated[Sampling, AfterValidator(sound)]


class ReportConfig(Group):
    """What the report of evaluate.py shows; see `report.observations` and `report.page`."""

    num_images: Count
    page_megabytes: Positive
    num_trajectories: Natural
    num_frames: Annotated[int, Field(ge=2, le=10_000)]
    cost_windows: tuple[Slots, ...]
    publish: Literal["none", "wandb"]
    judged: str | None
