"""Two processes started on one run_dir: the second is refused, and changes nothing of the first one's."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sjd2_lightning.cli.evaluate import evaluate
from sjd2_lightning.cli.train import train
from sjd2_lightning.config.reading import conf_dir
from sjd2_lightning.run.owner import owned
from tests.tools.training_runs import SETTINGS, make_folder, places


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("one_owner"))


def composed(root: str, *overrides: str):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(root, list(overrides))


def content(place: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def test_training(folder, tmp_path):
    run_dir = tmp_path / "run"
    cfg = composed("train", *places(folder, run_dir), *SETTINGS, "trainer.max_steps=1")
    with owned(run_dir, "train"):
        (run_dir / "checkpoints").mkdir()
        (run_dir / "checkpoints" / ".last.ckpt.abc.writing").write_bytes(b"half of a live run's checkpoint")
        before = content(run_dir)
        with pytest.raises(ValueError, match=r"train runs here already \(process \d+ on "):
            train(cfg)
        assert content(run_dir) == before
    train(cfg)
    assert (run_dir / "model" / "backbone.json").is_file()
    assert not list(run_dir.rglob(".*")), "leftovers of a killed run, and no lock"


def test_evaluation(folder, tmp_path):
    run_dir = tmp_path / "run"
    small = ["num_prompts=1", "compare=[sjd]", "metrics=none", "logger=none", "warm_up=false"]
    cfg = composed("evaluate", *places(folder, run_dir)[::2], *small)
    with owned(run_dir, "evaluate"):
        before = content(run_dir)
        with pytest.raises(ValueError, match=r"evaluate runs here already \(process \d+ on "):
            evaluate(cfg)
        assert content(run_dir) == before
    evaluate(cfg)
    assert (run_dir / "report.json").is_file()
    assert not list(run_dir.glob(".*"))
