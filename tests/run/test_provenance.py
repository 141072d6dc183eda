"""Provenance: what it names, and that no secret gets into it."""

import json
import subprocess

import torch
from torch import nn

from sjd2_lightning.run import provenance as module
from sjd2_lightning.run.provenance import (
    REDACTED,
    TRAININGS_FILE,
    collect_provenance,
    git_state,
    never_saw_noise,
    redact,
    trainings_of,
    weights_hash,
    write_trainings,
)
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
    assert provenance["weights_hash"].startswith("sums-")
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


def hash_of(**tensors):
    model = nn.Module()
    for name, value in tensors.items():
        model.register_buffer(name, value)
    return weights_hash(model)


def test_weights_hash_sees_places_signs_and_types():
    x = torch.randn(2**19 + 5, generator=torch.Generator().manual_seed(0))
    swapped, negated, late = x[torch.tensor([1, 0, *range(2, len(x))])], -x, x.clone()
    late[-1] += 1
    pair = x.clone()
    pair[1], pair[3] = -pair[1], -pair[3]  # the top bits of two words
    others = [swapped, negated, late, pair, x[:-1], x.roll(2**19), x.half()]
    assert len({hash_of(a=value) for value in [x, *others]}) == 1 + len(others)
    assert hash_of(a=x, b=x[:0]) != hash_of(b=x, a=x[:0])


def test_weights_hash_depends_on_nothing_else():
    x = torch.randn(300, 7000, generator=torch.Generator().manual_seed(0)).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    more = hash_of(a=x)
    torch.set_num_threads(threads)
    misaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    strided = x.t().contiguous().t()
    assert {more, hash_of(a=misaligned), hash_of(a=strided)} == {hash_of(a=x)}
    # a change of this value would part all folders from what they hold
    held = "sums-1a1bd8b120960b44b842ce1061e968dce467ca796e621842ef0f87c268144525"
    assert hash_of(a=torch.arange(10)) == held


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


def test_what_is_known_of_noise_in_trainings(tmp_path):
    off, on, unknown = {"noise": {"enabled": False}}, {"noise": {"enabled": True}}, {"noise": None}
    assert never_saw_noise([off, off])
    assert not any(map(never_saw_noise, ([on, off], [off, on], [unknown, off], [], None)))
    assert trainings_of(tmp_path) is None
    write_trainings(tmp_path, [off, on])
    assert trainings_of(tmp_path) == [off, on]
    for text in ("{", "3", "[1]"):
        (tmp_path / TRAININGS_FILE).write_text(text)
        assert trainings_of(tmp_path) is None
