"""Provenance: what it names, and that no secret gets into it."""

import json
import subprocess

import torch
from torch import nn

from sjd2_lightning.run import provenance as module
from sjd2_lightning.run.provenance import REDACTED, collect_provenance, git_state, redact, weights_hash
from tests.tools.small_evaluation import PROMPTS, small_backbone
from tests.tools.source import REPO


def test_provenance_names_code_machine_weights_and_seeds():
    seeds = {item.key: item.seed for item in PROMPTS}
    provenance = collect_provenance(small_backbone(), {"window": 6, "api_key": "abc"}, seeds)
    assert provenance["seeds"]["p0"] == 100
    assert provenance["config"] == {"window": 6, "api_key": REDACTED}
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert provenance["hardware"]["device"] == "cpu"
    assert provenance["hardware"]["num_cpus"] >= 1
    assert len(provenance["weights_sha256"]) == 64
    json.dumps(provenance, allow_nan=False)


def test_commit_is_that_of_this_checkout():
    found = subprocess.run(["git", "-C", REPO, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert git_state()["commit"] == (found.stdout.strip() if found.returncode == 0 else None)


def test_no_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "a" / "b" / "provenance.py"))
    assert git_state() == {"commit": None, "dirty": None}


def test_weights_hash_sees_every_change():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = weights_hash(model)
    assert weights_hash(model) == before
    with torch.no_grad():
        model[1].running_mean[1] += 1e-6
    after = weights_hash(model)
    assert len({before, after, weights_hash(model.to(torch.bfloat16)), weights_hash(model.double())}) == 4


def test_secrets_are_blanked(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value")
    config = {
        "logger": {"api_key": "abc", "wandb_api_key": "abc", "password": "abc", "project": "p"},
        "note": "sent with s3cr3t-value inside",
        "url": "https://user:pass@host/x",
        "prompts": [{"key": "1f170", "prompt": "a"}],
        "newline_token": 8803,
        "missing": None,
        "share": 0.5,
    }
    blanked = redact(config)
    text = json.dumps(blanked)
    assert "s3cr3t" not in text
    assert "user:pass" not in text
    assert [blanked["logger"][name] for name in ("api_key", "wandb_api_key", "password")] == [REDACTED] * 3
    assert blanked["logger"]["project"] == "p"
    assert blanked["prompts"] == config["prompts"]
    assert (blanked["newline_token"], blanked["missing"], blanked["share"]) == (8803, None, 0.5)


def test_extra_entries_are_kept_and_blanked():
    found = collect_provenance(nn.Linear(1, 1), extra={"command": "x", "token": "abc"})
    assert (found["command"], found["token"]) == ("x", REDACTED)
