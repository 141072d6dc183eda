"""Weights say how they are decoded: their keys stand in front of those of the command line."""

import json

import pytest

from sjd2_lightning.cli import settings
from sjd2_lightning.cli.card import Card
from sjd2_lightning.cli.settings import settings_keys, with_settings, write_settings
from tests.tools.configurations import typed


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "model"
    keys = ["noise=trajectory", "noise.num_levels=[2,4]", "model.sampling.temperature=0.5"]
    config = typed("train", f"export_dir={folder}", *keys)
    write_settings(config, Card.of(config, 7, ""))
    (folder / "backbone.json").write_text("{}")
    return folder


def test_size_sampling_noise_and_levels_are_keys(export):
    keys = list(settings_keys(export))
    for key in ("model.image_size=[128,128]", "model.sampling.temperature=0.5", "noise.process.source=mean"):
        assert key in keys
    assert keys[-1] == "decoding.num_levels=2"
    composed = typed("evaluate", *keys, "weights=model")
    assert composed.methods["sjd2"].noise.state == "draft"
    assert composed.methods["sjd2"].num_levels == 2


def test_what_the_command_line_says_wins(export):
    words = [
        "-m",
        "noise=default",
        f"weights={export}",
        "model.sampling.temperature=1.0",
        "model.image_size=[8,8]",
    ]
    found = with_settings("evaluate", words)
    assert not [word for word in found if word.startswith("noise.")]
    assert found.index("model.sampling.top_k=0") < found.index("noise=default")
    assert found.count("model.image_size=[8,8]") == 1
    assert [word for word in found if word.startswith("model.sampling.temperature")] == [
        "model.sampling.temperature=1.0"
    ]
    assert with_settings("train", words) == words
    for plain in (["weights=model"], ["weights=auto", "a=b"], ["a=b"], []):
        assert with_settings("evaluate", plain) == plain


def test_a_repository_is_pinned_to_the_commit_that_was_found(export, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "located", lambda path, key: snapshot)
    snapshot = export.rename(tmp_path / ("c" * 40))
    found = with_settings("evaluate", ["model=tiny", "weights=me/mine@v1"])
    assert found[-3:] == [f"model.path='me/mine@{'c' * 40}'", "weights=model", "model=tiny"]
    (snapshot / "backbone.json").rename(snapshot / "adapter_config.json")
    assert f"model.adapter='me/mine@{'c' * 40}'" in with_settings("evaluate", ["weights=me/mine"])
    (snapshot / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"neither backbone\.json nor adapter_config\.json.*model\.path=me/mine"
    ):
        with_settings("evaluate", ["weights=me/mine"])


def test_exports_of_older_versions_leave_the_command_line_alone(tmp_path):
    words = [f"weights={tmp_path}"]
    assert with_settings("evaluate", words) == words
    (tmp_path / "settings.json").write_text(json.dumps({"image_size": [8, 8], "sampling": {}}))
    assert with_settings("evaluate", words) == words
