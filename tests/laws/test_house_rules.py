"""What CONTRIBUTING promises of names, sizes and tests, for every tracked or new source file."""

import ast
import pickle
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import lightning as L
import torch
from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from sjd2_lightning import decoding
from tests.laws.test_layers import FORWARDING
from tests.tools.source import PACKAGE, REPO, modules, unused

BANNED_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}

# Names of two modules, each of which says what it is together with its room.
SHARED_NAMES = {
    "build": "cli: models and data from the configuration; data: shards from pictures",
    "config": "the room of the whole configuration; decoding: that of one method",
    "noise": "what training and decoding share; training: which codes are noisy, and how much",
    "pairs": "cli: the command that counts code pairs; decoding: the variant that reads the counts",
    "reading": "config: typed values from a composed tree; data: samples from shards",
}

# Methods that frameworks call: names of their base classes.
HOOKS = {
    name
    for owner in (
        *(ModelCheckpoint, L.LightningDataModule, L.LightningModule, Strategy, HydraCallback),
        torch.autograd.Function,
    )
    for name in dir(owner)
} | set(dir(pickle._Unpickler))
# What nothing in the package calls, and why it is there all the same.
UNCALLED = {
    "config.groups: Group._no_problems": "pydantic calls validators",
    "data.loader: CodeLoader.set_epoch": "Lightning tells a sampler the epoch",
    "cli.loggers: Tracking.finalize": "Lightning ends its loggers",
    "cli.preview: PictureProgress.get_renderables": "rich asks a progress for what it shows",
    "decoding.output: DecodeOutput.image_ids_by_row": "public: codes of images of several sizes",
}

# Folders of tests that mirror no room.
FREE_TESTS = {"laws", "tools", "benchmarks"}


def source_files() -> list[Path]:
    """Python files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    files = [REPO / name for name in listed if (REPO / name).is_file()]
    assert len(files) > 10, "git lists too few files: the rules below would hold by checking nothing"
    return files


def test_files_are_short():
    lengths = {str(path.relative_to(REPO)): len(path.read_text().splitlines()) for path in source_files()}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_functions_are_short():
    wrong = {}
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    wrong[f"{path.relative_to(REPO)}:{node.lineno} {node.name}"] = length
    assert not wrong


def test_names_say_something():
    names = {str(path): {path.stem, path.parent.name} for path in source_files()}
    assert not [path for path, parts in names.items() if parts & BANNED_NAMES]


def test_argument_lines_have_a_noun():
    """`seed: seed of the draw` says what it is; `seed: of the draw` leaves it to the type."""
    without = re.compile(r"^ +[a-z_0-9]+(, [a-z_0-9]+)*: of ")
    assert not lines_that(without)


def test_constants_are_whole():
    """The formatter tears a constant apart to make room for its comment: that belongs on the line above."""
    assert not lines_that(re.compile(r"^ *\)  # (?!fmt:|noqa|type:)"))


def lines_that(match: re.Pattern[str]) -> list[str]:
    """Lines of the package that match, by file and number."""
    return [
        f"{path.relative_to(REPO)}:{number} {line.strip()}"
        for path in modules().values()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if match.search(line)
    ]


def test_no_two_modules_share_a_name():
    found = defaultdict(set)
    for module in modules().keys() - FORWARDING:
        found[module.rpartition(".")[2]].add(module)
    shared = {name: sorted(own) for name, own in found.items() if len(own) > 1 and name != "__main__"}
    assert shared.keys() <= SHARED_NAMES.keys(), {
        name: own for name, own in shared.items() if name not in SHARED_NAMES
    }


def test_the_package_calls_what_it_defines():
    """Nothing is there for tests or benchmarks alone."""
    folders = (REPO / PACKAGE / "report" / "templates", REPO / "conf")
    others = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.*"))
    found = unused({module: path.read_text() for module, path in modules().items()}, others)
    wrong = []
    for line in found:
        name = line.partition(": ")[2]
        is_hook = "." in name and name.rpartition(".")[2] in HOOKS
        if not is_hook and name not in decoding.__all__ and line not in UNCALLED:
            wrong.append(line)
    assert not wrong, "move it to benchmarks/ or tests/tools/, or delete it"
    assert not UNCALLED.keys() - set(found), "an exception that nothing needs"


def test_what_is_unused_is_seen():
    own = "def f():\n    return f()\n\nclass A:\n    def g(self): ...\n    def h(self):\n        self.g()\n"
    assert unused({"a": own}) == ["a: A", "a: A.h", "a: f"]
    assert unused({"a": own, "b": "from a import A, f\n\nA().h()\n"}) == ["a: f"]
    assert unused({"a": own}, others="<p>{{ f }} {{ A.h }}</p>") == []


def test_tests_mirror_modules():
    root, wrong = REPO / "tests", []
    for path in sorted(root.rglob("test_*.py")):
        folder = path.parent.relative_to(root)
        mirrored = REPO / PACKAGE / folder / f"{path.stem.removeprefix('test_')}.py"
        if not FREE_TESTS & set(folder.parts) and not mirrored.is_file():
            wrong.append(str(path.relative_to(REPO)))
    assert not wrong, "name it after its module, or move it to tests/laws"


def test_no_output_is_tracked():
    command = ["git", "ls-files", "outputs", "multirun", "wandb", "data", ".venv", "*.pyc", "*.ckpt"]
    assert not subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
