"""The trace of a training: two steps, small, in the format that Perfetto reads."""

import gzip
import json

import lightning as L

from sjd2_lightning.training.trace import Trace
from tests.training.test_module import OFF, QUIET, batch_of, loader, module_of


def test_two_steps_are_traced(tmp_path):
    settings = QUIET | {"callbacks": [Trace(tmp_path / "profile")], "max_steps": 7}
    L.Trainer(**settings).fit(module_of(OFF), loader([batch_of()] * 7))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank_0.json.gz"
    assert path.stat().st_size < 5e6
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 2


def test_a_training_that_is_too_short_leaves_nothing(tmp_path):
    settings = QUIET | {"callbacks": [Trace(tmp_path / "profile")], "max_steps": 2}
    L.Trainer(**settings).fit(module_of(OFF), loader([batch_of()] * 2))
    assert not list(tmp_path.rglob("*.gz"))
