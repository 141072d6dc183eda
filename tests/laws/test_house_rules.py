"""Sizes and names that CONTRIBUTING promises, for every tracked or new source file."""

import ast
import subprocess
from pathlib import Path

from tests.tools.source import REPO

BANNED_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}


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


def test_no_output_is_tracked():
    command = ["git", "ls-files", "outputs", "multirun", "wandb", "data", ".venv", "*.pyc", "*.ckpt"]
    assert not subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
