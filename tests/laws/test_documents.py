"""What the documents tell a reader to type exists, parses, and runs where that is cheap."""

import importlib
import re
import shlex
import subprocess
import tomllib

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.tools.source import REPO

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/LOG.md"),
    *("docs/evaluation.md", "docs/gpu.md", "docs/play.md", "docs/data.md", "docs/models.md"),
    *("docs/tarflow.md", "docs/pccot.md", "docs/ceed.md", "docs/fixed-points.md"),
    *("docs/scaling.md", "docs/training.md", "docs/reference/configuration.md"),
    *("docs/index.md", "docs/first-steps.md", "docs/glossary.md", "docs/tutorials/own-pictures.md"),
    "docs/first-checkpoint.md",
    *(f"docs/how-to/{name}.md" for name in ("sweeps", "large-model", "resume", "wandb", "gpu")),
]
FENCE = re.compile(r"(<!-- run -->\n)?```(\w+)\n(.*?)```", re.S)
TEXT = {name: (REPO / name).read_text() for name in DOCUMENTS}
RUNNABLE = [
    pytest.param(body, id=f"{name}-{i}")
    for name, text in TEXT.items()
    for i, (run, language, body) in enumerate(FENCE.findall(text))
    if run and language == "python"
]


def commands() -> list[list[str]]:
    """The words of every shell command in the documents' fenced blocks and inline code."""
    lines = []
    for text in TEXT.values():
        lines += [
            line
            for _, language, body in FENCE.findall(text)
            if language == "bash"
            for line in body.replace("\\\n", " ").split("\n")
        ]
        lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    words = [
        shlex.split(line, comments=True) for line in lines if line.count('"') % 2 == 0 and "'" not in line
    ]
    return [command for command in words if command]


def scripts() -> list[tuple[str, tuple[str, ...]]]:
    """(root configuration, overrides) of every documented call of train.py and evaluate.py."""
    found = []
    for words in commands():
        for i, word in enumerate(words[:2]):
            by_table = words[0] == "sjd2" and word in ("train", "evaluate")
            if by_table or word in ("train.py", "evaluate.py", "sjd2-train", "sjd2-evaluate"):
                root = word.removesuffix(".py").removeprefix("sjd2-")
                found.append((root, tuple(word for word in words[i + 1 :] if "=" in word)))
    return sorted(set(found))


def first_of_sweep(override: str) -> str:
    """The override with the first of its sweep's values."""
    parsed = OverridesParser.create().parse_override(override)
    return (
        f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"
        if parsed.is_sweep_override()
        else override
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT[name])
    assert not [link for link in links if not ((REPO / name).parent / link).exists()]


def test_named_files_exist():
    """Paths in inline code that look like files of the repository do exist."""
    tops = ("sjd2_lightning/", "conf/", "tests/", "docs/", "notebooks/", "weights/")
    named = {
        word for text in TEXT.values() for word in re.findall(r"`([\w./]+)`", text) if word.startswith(tops)
    }
    assert len(named) > 5
    assert not sorted(word for word in named if not (REPO / word).exists())


def test_make_targets_exist():
    targets = {words[1] for words in commands() if words[0] == "make" and len(words) > 1}
    assert {"demo", "test", "lint"} <= targets
    listed = set(re.findall(r"^([a-z-]+):.*## ", (REPO / "Makefile").read_text(), re.M))
    assert targets <= listed


def test_first_two_commands():
    block = next(body for _, language, body in FENCE.findall(TEXT["README.md"]) if language == "bash")
    assert [shlex.split(line, comments=True) for line in block.strip().split("\n")] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@pytest.mark.parametrize(
    ("root", "overrides"), scripts(), ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)
def test_documented_overrides_compose(root, overrides):
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        compose(root, [first_of_sweep(override) for override in overrides])


def test_configuration_groups_exist():
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|", TEXT["docs/reference/configuration.md"].partition("| group |")[2], re.M
    )
    groups = {name for row in rows for name in re.findall(r"\w+", row)}
    assert groups == {path.name for path in (REPO / "conf").iterdir() if path.is_dir()}


def test_every_python_block_compiles():
    for name, text in TEXT.items():
        for _, language, body in FENCE.findall(text):
            if language == "python":
                compile(body, name, "exec")


@pytest.mark.parametrize("body", RUNNABLE)
def test_marked_python_blocks_run(body, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    exec(compile(body, "README", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_readme_has_a_python_block_that_runs():
    assert RUNNABLE


def test_console_scripts_resolve():
    names = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
    for target in names.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_ci_script_parses():
    subprocess.run(["bash", "-n", str(REPO / ".ci" / "run")], check=True)


@pytest.mark.parametrize(("root", "variable"), [("train", "DEMO_TRAIN_ARGS"), ("evaluate", "DEMO_EVAL_ARGS")])
def test_reduced_demo_of_ci_composes(root, variable):
    [arguments] = re.findall(f'{variable}="(.*?)"', (REPO / ".ci" / "run").read_text())
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        compose(root, ["experiment=demo", *arguments.split()])
