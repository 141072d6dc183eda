"""What the typed groups of the configuration are made of: number types, the base class, shipped paths."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(path: str | Path) -> Path:
    """A path as it is if it exists, else where the checkout or the installed package ships it."""
    roots = (Path(), _PACKAGE.parent, _PACKAGE)
    return next((root / path for root in roots if (root / path).exists()), Path(path))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Names the known name that is close, or else all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known))}"


def several(problems: list[str]) -> PydanticCustomError:
    """One validation error that carries several problems, each a line that starts with its key."""
    return PydanticCustomError("several", "{lines}", {"lines": "\n".join(problems)})


Value = TypeVar("Value")


def sound(value: Value) -> Value:
    """A dataclass of the package as it is, if its own `problems()` finds none."""
    if found := value.problems():  # type: ignore[attr-defined]
        raise several(found)
    return value


class Group(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def problems(self) -> list[str]:
        """What is wrong between fields that are right each by itself; a line each, starting with the key."""
        return []

    @model_validator(mode="after")
    def _no_problems(self) -> Group:
        if found := self.problems():
            raise several(found)
        return self
