"""What every test shares: one thread, no network, shapes checked at run time."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

from tests.tools.browser import chromium, programs

# Before torch is imported: more threads than cores make small models slower, and no test may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["WDS_SECURE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

REPO = Path(__file__).resolve().parent.parent

# Parts whose signatures carry jaxtyping shapes; their calls are checked with beartype in every test.
CHECKED = ["noise", "embedding", "training.objective", "decoding", "models"]

# Types and shapes of the tensor parts are checked; the hook must be there before any of them is imported.
import tests.tools.typecheck  # noqa: E402, F401  the hook looks it up as an attribute of `tests.tools`

install_import_hook([f"sjd2_lightning.{name}" for name in CHECKED], "tests.tools.typecheck.checked")

pytest_plugins = ["tests.tools.shards"]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def tiny_weights(repo: Path) -> Path:
    """The folder of the shipped weights."""
    return repo / "weights" / "tiny"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte; needs a root that may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A session of headless Chromium, for the tests of one file."""
    try:
        programs()
    except LookupError as missing:
        pytest.fail(str(missing), pytrace=False)
    with chromium() as session:
        yield session
