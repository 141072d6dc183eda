"""Scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from tests.tools.source import REPO


def script(name: str) -> ModuleType:
    """A script by name; it finds the modules beside it, as when it is run."""
    sys.path.insert(0, str(REPO / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REPO / "benchmarks"))
