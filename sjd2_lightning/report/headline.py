"""What an evaluation found, in one sentence and three numbers.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from sjd2_lightning.comparison import BASELINE, EvaluationResult, MethodResult


@dataclass(frozen=True)
class Headline:
    """The fastest lossless method.

    Attributes:
        method: its name.
        sentence: what it does.
        numbers: (value, unit) each, the largest first.
    """

    method: str
    sentence: str
    numbers: tuple[tuple[str, str], ...]


def headline(result: EvaluationResult) -> Headline | None:
    """The fastest lossless method beside the baseline; None where there is none, or no baseline."""
    drafting = [
        method
        for name, method in result.methods.items()
        if name != BASELINE and method.config.lossless and "speedup" in method.figures
    ]
    if not drafting:
        return None
    best = max(drafting, key=lambda method: method.figures["speedup"].value)
    numbers = (
        (f"{best.figures['speedup'].value:.2f}×", "speedup, wall clock"),
        (f"{best.figures['step_compression'].value:.2f}", "tokens a pass"),
        (f"{best.figures['nfe'].value:.0f}", f"passes an image{_of_baseline(result)}"),
    )
    return Headline(best.name, f"{best.name} is the fastest lossless method here{_promise(best)}.", numbers)


def _promise(best: MethodResult) -> str:
    if best.equal_to_ar == 1:
        return ": its images are those of plain decoding, token for token"
    if best.config.acceptance == "replay":
        return ""
    return ": it draws other images than plain decoding, by the same law"


def _of_baseline(result: EvaluationResult) -> str:
    return f", plain decoding {result.methods[BASELINE].figures['nfe'].value:.0f}"
