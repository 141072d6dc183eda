"""Names on the hub: what is one, and what is said where it cannot be had."""

from pathlib import Path

import pytest

from sjd2_lightning.models import hub
from sjd2_lightning.models.hub import HubName, located
from tests.tools.configurations import problems


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("me/mine", HubName("me/mine")),
        ("me/mine@v1", HubName("me/mine", "v1")),
        ("me/mine@refs/pr/3", HubName("me/mine", "refs/pr/3")),
        ("hf://weights/mine", HubName("weights/mine")),
        ("weights/mine@v1", HubName("weights/mine", "v1")),
        ("weights/mine", None),
        ("outputs/mine", None),
        ("./mine", None),
        ("mine", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("me/mine@", None),
    ],
)
def test_what_is_a_name_on_the_hub(text, name):
    assert HubName.of(text) == name


def test_a_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/mine@v1").mkdir(parents=True)
    assert HubName.of("me/mine@v1") is None
    assert HubName.of("me/other") is None, "an owner's folder is here: a name in it is a typing error"
    assert located("me/mine@v1", "weights") == Path("me/mine@v1")


def test_a_name_that_cannot_be_had_says_key_and_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    remedy = r"neither in the hub's cache .*`HF_HUB_OFFLINE=0 hf download nobody/gone --revision v1`; or give"
    with pytest.raises(ValueError, match=rf"^model\.adapter=nobody/gone@v1: it is {remedy}"):
        located("nobody/gone@v1", "model.adapter")
    found = problems("evaluate", "model.path=nobody/gone@v1", "weights=model", "model.adapter=nobody/too")
    assert [line.partition(": ")[0] for line in found] == [
        "model.path=nobody/gone@v1",
        "model.adapter=nobody/too",
    ]


def test_a_snapshot_is_asked_for_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download", lambda name: asked.append(name) or tmp_path)
    assert [located("me/once@v1", "weights") for _ in range(3)] == [tmp_path] * 3
    assert asked == [HubName("me/once", "v1")]
