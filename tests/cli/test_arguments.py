"""Values with special characters are read as they are typed; names of other tools lead to the key."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from sjd2_lightning.cli import launch as launching
from sjd2_lightning.cli.arguments import OTHER_WORDS, close_keys, program, readable_arguments
from sjd2_lightning.config.reading import conf_dir, train_config
from tests.tools.configurations import composed


def read(*words: str, script: str = "train"):
    """The configuration that a command line composes to."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(script, readable_arguments(script, list(words)))


PATHS = (
    "runs/epoch=0-step=2.ckpt",
    "runs/a#b",
    "runs/x (1)",
    "runs/über/прогон/画像",
    "runs/it's",
    'runs/"so"',
    "runs/a,b;c",
    "runs/50%!&^`<>",
    "runs\\old\\",
    "runs/back\\'slash=1",
    "runs/with blank",
    "runs/👍",
    "runs/a{b}",
    "runs/a[0]",
    "-runs",
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_what_was_typed(path):
    assert read(f"run_dir={path}").run_dir == path


def test_the_home_folder_is_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone else")
    assert read("run_dir=~/x").run_dir == "/home/someone else/x"
    assert read("run_dir=~").run_dir == "/home/someone else"
    assert read("run_dir=a~b").run_dir == "a~b"
    assert read("run_dir=~x/y").run_dir == "~x/y"


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("compare=[ar,sjd2]", "compare", ["ar", "sjd2"]),
        ("decoding.window=16", "decoding.window", 16),
        ("model.peft=null", "model.peft", None),
        ("run_dir='a=b'", "run_dir", "a=b"),
        ('run_dir="a=b"', "run_dir", "a=b"),
        ("export_dir=${run_dir}/x=1", "export_dir", "out/x=1"),
        ("+data.extra={a: 1}", "data.extra", {"a": 1}),
        ("logger.wandb.tags=['a b','c=d']", "logger.wandb.tags", ["a b", "c=d"]),
    ],
)
def test_what_hydra_reads_stays_as_it_is(word, key, value):
    cfg = read("run_dir=out", word)
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value


def test_options_and_values_of_a_sweep_stay_apart():
    words = ["-m", "ckpt_path=a=1.ckpt,b.ckpt", "decoding.window=16,32", "hydra.sweep.dir=x"]
    read = readable_arguments("train", words)
    assert read == ["-m", "ckpt_path='a=1.ckpt',b.ckpt", "decoding.window=16,32", "hydra.sweep.dir=x"]


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train", ["run_dir=[x"], "run_dir=[x: cannot be read"),
        ("train", ["run_dir='x"], "run_dir='x: cannot be read"),
        ("train", ["tiny"], "tiny: is no KEY=VALUE"),
        ("train", ["--max-steps", "10"], "did you mean `trainer.max_steps=10`?"),
        ("train", ["--max_steps=10"], "did you mean `trainer.max_steps=10`?"),
        ("train", ["--lr", "1e-4"], "did you mean `optimizer.lr=1e-4` or `corrector.lr=1e-4`?"),
        ("evaluate", ["--num-prompts", "4"], "did you mean `num_prompts=4`"),
        ("evaluate", ["--prompt"], "did you mean `data.prompt_file=VALUE` or `num_prompts=VALUE`?"),
    ],
)
def test_what_cannot_be_read_says_how_to_write_it(script, words, expected):
    with pytest.raises(ValueError) as caught:
        readable_arguments(script, words)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "name", "key"),
    [
        ("evaluate", "prompt", "data.prompt_file"),
        ("evaluate", "prompts", "data.prompt_file"),
        ("train", "prompts", "data.prompt_file"),
        ("train", "optimizer.learning_rate", "optimizer.lr"),
        ("train", "learning-rate", "optimizer.lr"),
        ("train", "lr", "optimizer.lr"),
        ("train", "max_steps", "trainer.max_steps"),
        ("train", "epochs", "trainer.max_epochs"),
        ("train", "trainer.max_stps", "trainer.max_steps"),
        ("train", "batch_size", "data.batch_size"),
        ("train", "gpus", "trainer.devices"),
        ("evaluate", "window", "decoding.window"),
        ("evaluate", "temperature", "decoding.sampling.temperature"),
        ("evaluate", "decoding.temperature", "decoding.sampling.temperature"),
        ("evaluate", "methods.sjd2.windw", "methods.sjd2.window"),
        ("train", "image_size", "model.image_size"),
        ("train", "output_dir", "run_dir"),
    ],
)
def test_names_lead_to_the_key(script, name, key):
    assert close_keys(script, name)[0] == key


def test_words_of_other_tools_stand_for_keys_that_exist():
    trees = [composed(root) for root in ("train", "evaluate")]

    def exists(key: str) -> bool:
        found = trees
        for part in key.split("."):
            found = [tree[part] for tree in found if tree is not None and part in tree]
        return bool(found)

    assert [key for keys in OTHER_WORDS.values() for key in keys if not exists(key)] == []


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `launch` as the command line does, in an empty folder; the exit status."""
    monkeypatch.chdir(tmp_path)

    def job(cfg) -> None:
        Path("seen").write_text(cfg.run_dir)
        (Path(cfg.run_dir) / "result").touch()  # a run that wrote nothing leaves no folder

    def run(*arguments: str, check=None) -> int:
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        GlobalHydra.instance().clear()
        try:
            launching.launch("train", job, check)
        except SystemExit as end:
            return end.code
        finally:
            GlobalHydra.instance().clear()
        return 0

    return run


@pytest.mark.parametrize("path", ["a=1-b=2", "x (1)#", "прогон", "it's, so"])
def test_a_run_lies_where_it_was_asked_for(command, tmp_path, path):
    assert command(f"run_dir={path}") == 0
    assert Path("seen").read_text() == path
    assert {entry.name for entry in tmp_path.iterdir()} == {path, "seen"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=lumina"], "model=lumina: no such choice; did you mean `lumina_mgpt`"),
        (["trainer=cup"], "trainer=cup: no such choice; did you mean `cpu`?"),
        (["experiment=dem"], "experiment=dem: no such choice; did you mean `demo`?"),
        (["optimizer.learning_rate=1"], "optimizer.learning_rate: unknown key; did you mean `optimizer.lr`?"),
        (["run_dir=${oc.env:NOPE}"], "NOPE"),
        (["run_dir=${x"], "${x"),
        (["run_dir=[x"], "in quotes inside quotes"),
        (["+hydra.callbacks.x={_target_: os.system}"], "this target is not allowed"),
        (["modle=tiny"], "modle: unknown key; did you mean `model`"),
    ],
)
def test_every_refusal_is_one_line_and_leaves_nothing(command, tmp_path, capfd, words, expected):
    assert command(*words) == 2
    shown = capfd.readouterr().err.strip()
    assert expected in shown
    assert "\n" not in shown
    assert not list(tmp_path.iterdir())


def test_what_is_checked_first_decides_whether_a_folder_is_made(command, tmp_path, capfd):
    def refuse(cfg):
        train_config(cfg)
        raise AssertionError

    Path("file").touch()
    assert command("run_dir=file/x", check=refuse) == 2
    assert command("run_dir=x", "hydra.run.dir=file/y", check=refuse) == 2
    shown = capfd.readouterr().err
    assert "run_dir=file/x: file is a file; give a folder" in shown
    assert "run_dir=file/y: file is a file; give a folder" in shown
    Path("file").unlink()
    assert command("run_dir=x", check=lambda cfg: "nothing to do") == 0
    assert capfd.readouterr().out == "nothing to do\n"
    assert not list(tmp_path.iterdir())
    assert command("run_dir=x", check=lambda cfg: None) == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"x", "seen"}


def test_the_program_is_named_as_it_was_started(tmp_path, monkeypatch):
    """What is printed to be typed works where it is pasted."""
    for place in ("bin", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "sjd2").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    for started, typed_again in {
        tmp_path / "bin" / "sjd2": "sjd2",
        Path("other/sjd2"): "other/sjd2",
        Path("/elsewhere/sjd2_lightning/__main__.py"): f"{Path(sys.executable).name} -m sjd2_lightning",
        Path("/elsewhere/pytest"): "sjd2",
    }.items():
        monkeypatch.setattr(sys, "argv", [str(started)])
        assert program() == typed_again
