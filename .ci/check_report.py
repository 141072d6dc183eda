"""Check that a report of `evaluate.py` holds every method and figure that README promises."""

import json
import math
import sys
from pathlib import Path

METHODS = ("ar", "sjd", "mc_sjd", "sjd2", "sjd2_paper")
FIGURES = ("nfe", "step_compression", "speedup", "fd", "kid", "num_images")


def problems(report: dict) -> list[str]:
    """Return what is missing from, or not a finite number in, the report."""
    found = []
    for method in METHODS:
        figures = report.get("methods", {}).get(method)
        if figures is None:
            found.append(f"methods.{method} is missing")
            continue
        for name in FIGURES:
            value = figures.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                found.append(f"methods.{method}.{name} is {value!r}, not a finite number")
        if figures.get("num_images") == 0:
            found.append(f"methods.{method} has no images")
    if not report.get("provenance"):
        found.append("provenance is missing")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = problems(json.loads(path.read_text()))
    print("\n".join(found) or f"{path}: complete")
    sys.exit(bool(found))
