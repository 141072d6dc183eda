"""What values a dataclass takes, declared beside the type of each field, and the one check of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 2**31 - 1  # whole numbers above it overflow somewhere in torch, NumPy or Lightning


@dataclass(frozen=True)
class Within:
    """Bounds of a number, written as `Annotated[int, Within(1)]`.

    Attributes:
        least, most: the bounds.
        without: which of the two are themselves left out: "", "least", "most" or "both".
    """

    least: float = 0
    most: float = MOST
    without: Literal["", "least", "most", "both"] = ""

    def complaint(self, value: float) -> str | None:
        """What a number must be that is out of bounds; None for the others."""
        open_below, open_above = self.without in ("least", "both"), self.without in ("most", "both")
        enough = value > self.least if open_below else value >= self.least
        not_more = value < self.most if open_above else value <= self.most
        if enough and not_more:
            return None
        if self.most <= 1:
            left, right = "(" if open_below else "[", ")" if open_above else "]"
            return f"must lie in {left}{self.least}, {self.most}{right}"
        if not enough:
            return f"must be {'greater than' if open_below else 'at least'} {self.least}"
        return f"must be {'less than' if open_above else 'at most'} {self.most}"


Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
Share = Annotated[float, Within(0, 1)]


def wrong_values(values: Any) -> list[str]:
    """Fields of a dataclass whose value is not one that their type declares; a line each, key first."""
    return [
        f"{name}{place}={entry!r}: {complaint}"
        for name, hint in _declared(type(values)).items()  # type: ignore[arg-type]
        for place, entry, complaint in _complaints(getattr(values, name), hint)
    ]


@cache
def _declared(kind: Hashable) -> dict[str, Any]:
    """Types of the fields of a dataclass, bounds included."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def _complaints(value: Any, hint: Any) -> Iterator[tuple[str, Any, str]]:
    """What is wrong with a value, or with which of its elements: place inside it, the element, the reason."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for bounds in (entry for entry in arguments[1:] if isinstance(entry, Within)):
            if complaint := bounds.complaint(value):
                yield "", value, complaint
    elif origin is Literal and value not in arguments:
        yield "", value, f"must be one of {', '.join(map(str, arguments))}"
    elif origin in (Union, UnionType) and value is not None:
        found = [list(_complaints(value, member)) for member in arguments if _suits(value, member)]
        yield from min(found, key=len, default=[])
    elif origin is tuple and isinstance(value, tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        for place, (entry, kind) in enumerate(zip(value, kinds, strict=False)):
            for inner, element, complaint in _complaints(entry, kind):
                yield f".{place}{inner}", element, complaint


def _suits(value: Any, hint: Any) -> bool:
    """Whether a member of a union is meant: a word for its words, a number for its numbers."""
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    return hint is not NoneType and not isinstance(value, str)
