"""docs/first-checkpoint.md on shrunken weights: its own commands, one after the other, in an empty folder."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from sjd2_lightning.cli import prepare, publish
from sjd2_lightning.cli.evaluate import evaluate
from sjd2_lightning.cli.launch import composed
from sjd2_lightning.cli.train import train
from sjd2_lightning.models.registry import build_shrunken
from tests.tools.source import REPO

RELEASE = "weights/simple_ar/simplear_0.5B_rl"
SMALL = ["logger=none", "model.dtype=float32", "model.image_size=[32,32]", "decoding.window=8"]
# what stands in the place of a card and of hours
REPLACED = {
    "trainer=gpu": "trainer=cpu",
    "trainer.max_steps=2000": "trainer.max_steps=2",
    "num_prompts=64": "num_prompts=1",
    "num_prompts=8": "num_prompts=1",
}
TRAINING = ["trainer.limit_val_batches=1", "trainer.val_check_interval=2", "validate_first=false"]
TRAINING += ["callbacks.progress_bar=null", "callbacks.sampling=null"]


def commands() -> list[list[str]]:
    """The page's shell commands, in order."""
    text = (REPO / "docs" / "first-checkpoint.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").strip().split("\n")]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """An empty folder with pictures, and the release as a shrunken copy where the page puts it."""
    monkeypatch.chdir(tmp_path)
    build_shrunken("simple_ar").save(RELEASE)
    Path("photos").mkdir()
    for number in range(24):
        Image.new("RGB", (40, 40), (10 * number, 99, 255 - 10 * number)).save(f"photos/{number}.png")
        Path(f"photos/{number}.txt").write_text(f"a plain picture, the {number}th of its colour")


def run(words: list[str]) -> dict:
    """A command of the page, small and on this machine; a report or what a training measured."""
    name, words = words[1], [REPLACED.get(word, word) for word in words[2:]]
    if name == "prepare":
        here = {"cuda": "cpu", "1024": "32"}
        prepare.main([here.get(word, word) for word in words])
    elif name == "publish":
        publish.main(words)
    elif name == "train":
        return train(composed("train", [*words, *SMALL, *TRAINING]))
    else:
        assert name == "evaluate"
        return evaluate(composed("evaluate", [*words, *SMALL, "device=cpu", "warm_up=false"]))
    return {}


def test_every_command_of_the_page(photos, capsys):
    found = commands()
    assert [words[:2] for words in found] == [
        ["sjd2", "train"],
        *[["hf", "download"]] * 2,
        ["sjd2", "prepare"],
        ["sjd2", "train"],
        *[["sjd2", "evaluate"]] * 2,
        *[["sjd2", "publish"]] * 2,
        ["sjd2", "evaluate"],
    ]
    plan, _, _, shards, training, before, after, look, send, use = found
    run(shards)
    assert run(plan)["trained"] > 0
    assert run(training)["train/loss"] > 0
    assert "sjd2" not in run(before)["methods"]
    assert run(after)["methods"]["sjd2"]["equal_to_ar"] == 1
    run(look)
    folder = Path("outputs/publish/OWNER--simple-ar-sjd2")
    card = (folder / "README.md").read_text()
    assert "base_model: Daniel0724/SimpleAR" in card
    assert "| sjd2 | replay | 100 % |" in card
    assert "Pictures: my own, CC-BY 4.0" in card
    assert (folder / "tokenizer" / "decoder.jit").is_file()
    assert json.loads((folder / "settings.json").read_text())["image_size"] == [32, 32]
    assert send == look[:-1], "sent as it was looked at; tests/cli/test_publish.py sends to a hub"
    local = [word.replace("OWNER/simple-ar-sjd2", str(folder)) for word in use]
    assert set(run([*local, "run_dir=outputs/used"])["methods"]) == {"ar", "sjd2"}
