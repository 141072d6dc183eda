"""The study's commands on random weights: what is decoded, kept, pooled and compared."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import yaml

from benchmarks.likelihood import log_laws, nats_per_code
from benchmarks.shipped import shipped_prompts
from sjd2_lightning.decoding import Sampling, decode
from sjd2_lightning.decoding.config import Correction, DecodingConfig, TreeShape
from sjd2_lightning.evaluation.prompts import PromptItem
from sjd2_lightning.noise import NoiseProcess
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

NUM_PROMPTS = 3


@pytest.fixture(scope="module")
def study():
    return import_module("benchmarks.study.study")


def leave_run(folder, seed: int, enabled: bool, schedule: str, losses: list[float]) -> None:
    """A folder as train.py leaves it."""
    tiny_chameleon(6, seed=seed, scale=0.7).save(folder / "model")
    method = {"method": "sjd2", "window": 32, "num_levels": 2, "schedule": schedule}
    config = {
        "seed": seed,
        "methods": {"sjd2": method},
        "noise": {"enabled": enabled},
        "model": {
            "family": "chameleon",
            "image_size": [8, 8],
            "init": "pretrained",
            "path": "base",
            "trunk": "t",
        },
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    for version, loss in enumerate(losses):  # the run was continued once
        table = folder / "csv" / f"version_{version}" / "metrics.csv"
        table.parent.mkdir(parents=True)
        table.write_text(f"step,train/loss,val/loss_clean\n0,1.0,\n0,,{loss}\n")


@pytest.fixture(scope="module")
def options(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for seed in (0, 1):
        leave_run(folder / "runs" / f"plain-{seed}", seed, False, "linear", [2.0 + seed, 1.5])
        leave_run(folder / "runs" / f"bent-{seed}", seed, True, "karras", [2.0, 1.0 + seed])
    (folder / "runs" / "unfinished-0").mkdir()
    arguments = f"--runs {folder}/runs --out {folder}/out --num-prompts {NUM_PROMPTS} --batch 2 --windows 3 5"
    arguments += " --levels 0 2 --training-free mc_sjd gumbel+draft_init=repeat_left"
    arguments += " --temperature 0.9 --guidance-scale 2 --time 2"
    return study.command_line().parse_args(arguments.split())


@pytest.fixture(scope="module")
def found(study, options):
    return study.study(options)


def test_a_setting_is_what_decode_gives(study, options, found):
    [run] = [run for run in study.finished_runs(options.runs) if run.folder.name == "bent-1"]
    backbone = study.load_backbone("chameleon", run.folder / "model").eval()
    items = shipped_prompts(NUM_PROMPTS)
    config = DecodingConfig(
        "sjd2", 5, 2, noise=NoiseProcess(schedule="karras"), sampling=Sampling(0.9, guidance_scale=2.0)
    )
    assert study.settings(run, options)["replay-l2-w5"] == config
    kept = json.loads((options.out / "bent-1" / "t0.9-g2" / "replay-l2-w5.json").read_text())
    for row, item in enumerate(items):
        alone = decode(backbone, [item.prompt], [item.seed], config, backbone.layout(8, 8))
        assert kept["nfe"][row] == int(alone.stats.nfe[0])
    assert sum(int(num) * count for num, count in kept["accepted"].items()) == NUM_PROMPTS * kept["num_slots"]


def test_seeds_are_pooled_and_pairs_are_of_equal_seeds(options, found):
    assert list(found["variants"]) == ["plain", "bent"]
    plain, bent = found["variants"].values()
    assert plain["loss_clean_start"] == [2.0, 3.0]
    assert bent["loss_clean"] == [1.0, 2.0]
    assert bent["loss_clean_minus_plain"]["value"] == 0.0
    passes = {}
    for variant in ("plain", "bent"):
        for seed in (0, 1):
            for path in (options.out / f"{variant}-{seed}" / "t0.9-g2").glob("*-w*.json"):
                passes[variant, path.stem, seed] = sum(json.loads(path.read_text())["nfe"])
    for name, row in bent["settings"].items():
        total = sum(passes["bent", name, seed] for seed in (0, 1))
        assert row["tokens_a_pass"]["value"] == pytest.approx(2 * NUM_PROMPTS * 19 / total, abs=1e-4)
        rival = bent["best_training_free_of_plain"]
        theirs = sum(passes["plain", rival, seed] for seed in (0, 1))
        assert row["over_plain"]["value"] == pytest.approx(theirs / total, abs=1e-4)
        assert sum(row["share_of_passes"].values()) == pytest.approx(1, abs=1e-3)
        assert row["speedup"]["value"] > 0
        if name.startswith(("replay", "gumbel")):
            assert row["equal_to_ar"] == [2 * NUM_PROMPTS] * 2
    free = [name for name in bent["settings"] if not name.startswith("replay-l2")]
    assert len(free) == 6
    assert bent["settings"]["gumbel+draft_init=repeat_left-w5"]["tokens_a_pass"]["value"] > 0
    fewest = min(free, key=lambda name: sum(passes["bent", name, seed] for seed in (0, 1)))
    assert bent["best_training_free"] == fewest
    assert bent["settings"][fewest]["over_training_free"]["value"] == 1
    assert plain["entropy_minus_plain"] == {"value": 0, "interval": [0, 0]}


def test_what_is_done_is_not_decoded_again(study, options, found, monkeypatch):
    folder = options.out / "plain-0" / "t0.9-g2"
    (folder / "replay-l2-w3.json").unlink()
    (folder / ".replay-l2-w3.json.abcdefgh.writing").write_text("{")  # of a kill
    decoded = []

    def counted(backbone, config, *rest):
        decoded.append((config.window, config.num_levels))
        return ours(backbone, config, *rest)

    ours = study.decoded
    monkeypatch.setattr(study, "decoded", counted)
    again = study.study(options)
    assert decoded == [(3, 2)]
    assert json.dumps(again) == json.dumps(found)
    monkeypatch.setattr(options, "num_prompts", 2)
    study.study(options)
    assert len(decoded) == 1 + 4 * 9, "other prompts: nothing of before counts"
    monkeypatch.setattr(options, "num_prompts", NUM_PROMPTS)
    monkeypatch.setattr(options, "tabulate", True)
    with pytest.raises(SystemExit, match="nothing is decoded"):
        study.study(options)


def test_changes_of_a_method(study):
    config = study.changed(DecodingConfig("sjd2"), "+tree.width=3+tree.depth=2+draft_init=repeat_left")
    tree = TreeShape(width=3, depth=2)
    assert config == DecodingConfig("sjd2", draft_init="repeat_left", tree=tree)
    assert study.changed(config, "") == config
    for wrong in ("+trees.width=3", "+tree.wide=3", "+windows=3"):
        with pytest.raises(SystemExit, match="there is no decoding"):
            study.changed(config, wrong)
    with pytest.raises(ValueError, match="confidence"):
        study.changed(config, "+confidence=2.0")


def test_what_the_first_version_decoded_is_not_decoded_again(study):
    """The hash was taken from 0.1.0, where noise was no group of its own."""
    noise = NoiseProcess(schedule="karras", source="mean", state="draft")
    sampling = Sampling(0.9, guidance_scale=2.0)
    config = DecodingConfig("sjd2", window=16, num_levels=2, noise=noise, sampling=sampling)
    held = "5b908b41e5950660ef4d922f1b0e81e7efc278e7e9c6200ab1743e6bf84ec870"
    assert study.identity(config, "w", [PromptItem("a", "red", 3)]) == held


def test_what_only_some_methods_say_of_themselves_is_part_of_their_identity(study):
    plain, prompts = DecodingConfig("sjd2", 16, 1), [PromptItem("a", "red", 3)]
    kinds = [plain, replace(plain, corrector=Correction("own")), replace(plain, window_shape=16)]
    kinds += [replace(plain, window=64, max_changed=2), replace(plain, engine="eager")]
    assert len({study.identity(config, "w", prompts) for config in kinds}) == len(kinds)


def test_an_unknown_method_is_named(study, options, monkeypatch):
    monkeypatch.setattr(options, "training_free", ["mc_sdj+draft_init=gumbel"])
    with pytest.raises(SystemExit, match=r"no method 'mc_sdj'; known: .*mc_sjd"):
        study.study(options)


def test_outputs(study, found):
    assert json.loads(study.as_text(found)) == json.loads(json.dumps(found))
    text = study.markdown(found)
    assert text.count("| replay-l2 |") == 2
    assert study.figure_png(study.figure(found))[1:4] == b"PNG"


def test_laws_are_those_that_nats_are_counted_in():
    backbone, sampling = tiny_chameleon(4, seed=3, scale=0.6), Sampling(1.3, guidance_scale=2.0)
    layout = backbone.layout(4, 4)
    images = torch.tensor([[[0, 3], [1, 2]], [[2, 2], [0, 1]], [[3, 3], [3, 3]], [[1, 0], [2, 0]]])
    laws = log_laws(backbone, RAGGED_PROMPTS, images, layout, sampling)
    assert torch.allclose(laws.exp().sum(-1), torch.ones(4, 4))
    picked = np.take_along_axis(laws.numpy(), images.flatten(1)[..., None].numpy(), -1)[..., 0].mean(1)
    assert np.allclose(-picked, nats_per_code(backbone, RAGGED_PROMPTS, images, layout, sampling))
