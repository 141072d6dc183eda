"""Every name that is logged is explained in docs/how-to/wandb.md, and what is explained there is logged."""

import ast
import re

import pytest

from sjd2_lightning.report.wandb_log import SUMMARY, media_row, sampled_names
from tests.tools.small_evaluation import evaluate
from tests.tools.source import REPO, modules

DOCUMENT = REPO / "docs" / "how-to" / "wandb.md"
# logged by Lightning and by code that names are handed to
ELSEWHERE = {
    "train/lr",
    "train/lr/pg1",
    "lr-AdamW",
    "epoch",
    "trainer/global_step",
    "train/skipped_samples",
    "train/skipped_steps",
    "train/loss_spikes",
    "val/window_sjd2",
    "val/pick_score_minus_ar",
    "val/fid",
    "val/kid",
    "eval/cost",
    "eval/settling",
}


def documented() -> list[re.Pattern[str]]:
    """Patterns of the names in the table; `<x>` stands for a word."""
    section = DOCUMENT.read_text().partition("## What is logged")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    names = [name for line in lines for name in re.findall(r"`([a-z_]+(?:[-/][^`]*)?)`", line)]
    names = [name for name in names if "/" in name or name == "epoch" or name.startswith("lr-")]
    return [re.compile(re.sub(r"<[a-z]+>", r"[\\w@.-]+", name)) for name in names]


def of_source() -> set[str]:
    """Names in calls of `self.log` all over the package; what is filled in becomes `1`."""
    found = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "log"
            ):
                name = node.args[0] if node.args else None
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    found.add(name.value)
                elif isinstance(name, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "1" for part in name.values]
                    found.add("".join(map(str, parts)))
    found = {name for name in found if name.startswith(("train/", "val/"))}
    bands = {"val/loss_low", "val/loss_high"}
    return {name for name in found if name != "val/loss_1"} | (bands if "val/loss_1" in found else set())


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Names of all sections, with the method's section under that of the first."""
    rows = media_row(evaluate(tmp_path_factory.mktemp("logged")))
    sampled = sampled_names(["ar", "sjd2"], ["EffNetLite0"], True, True, further=["cmmd", "pick_score"])
    own = {re.sub(r"^val_(?!acceptance/)[a-z0-9_]+/", "val/", name) for name in rows}
    return own | {name for name in sampled if not name.endswith("_ar")} | of_source() | ELSEWHERE


def test_every_logged_name_is_explained(logged):
    assert {"train/loss", "val/loss_low", "val/nfe", "val_acceptance/sjd2"} <= logged
    patterns = documented()
    assert [name for name in sorted(logged) if not any(p.fullmatch(name) for p in patterns)] == []


def test_nothing_is_explained_that_is_not_logged(logged):
    stale = [p.pattern for p in documented() if not any(p.fullmatch(name) for name in logged)]
    assert stale == []


def test_summaries_are_of_logged_names(logged):
    assert {name.replace("eval/", "val/") for name in SUMMARY} <= logged
