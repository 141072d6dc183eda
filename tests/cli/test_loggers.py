"""TensorBoard and MLflow: refused in one line where missing, scores and pictures where not."""

import importlib.util

import pytest
from hydra import compose, initialize_config_dir

from sjd2_lightning.config import groups
from sjd2_lightning.config.groups import MlflowConfig
from sjd2_lightning.config.reading import ConfigError, conf_dir, train_config
from tests.test_callbacks import Module, fit, sampling


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_one_line_with_its_command(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        groups.importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted)
    )
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [f"logger={name}", "run_dir=out"])
    with pytest.raises(ConfigError) as refused:
        train_config(cfg)
    (line,) = refused.value.problems
    assert f"logger.{name}: the package {name} is not installed" in line
    assert f"pip install 'sjd2-lightning[{name}]'" in line


def test_tensorboard_gets_scores_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sjd2_lightning.cli.loggers import tensorboard_logger

    fit(tmp_path, Module(), sampling(tmp_path), logger=[tensorboard_logger(tmp_path)])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload()
    assert [event.step for event in events.Scalars("val/nfe")] == [2]
    assert [event.step for event in events.Images("val/images")] == [2]


def test_mlflow_gets_scores_and_pictures(tmp_path):
    pytest.importorskip("mlflow")
    from sjd2_lightning.cli.loggers import mlflow_logger

    run_dir = tmp_path / "run"
    logger = mlflow_logger(MlflowConfig(tracking_uri=None, experiment="x", name=None), run_dir, {"seed": 3})
    fit(run_dir, Module(), sampling(run_dir), logger=[logger])
    (found,) = logger.experiment.search_runs([logger.experiment_id])
    assert (found.info.run_name, found.data.params["seed"]) == ("run", "3")
    assert "val/nfe" in found.data.metrics
    assert [path.name for path in (tmp_path / "mlflow").rglob("*.png")] == ["step_00000002.png"]
