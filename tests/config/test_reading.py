"""Every shipped configuration composes and is valid; every wrong one is refused with all its problems."""

from copy import deepcopy

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf

from sjd2_lightning.config.reading import ConfigError, save_config, train_config
from tests.tools.configurations import CONF, EXPERIMENTS, OPTIONS, composed, problems, put_named_files, typed


@pytest.fixture(autouse=True)
def named_files(tmp_path, monkeypatch):
    """What a shipped configuration names is there."""
    put_named_files(tmp_path, monkeypatch)


def test_addresses_of_data():
    assert typed("train", "data=shards", "data.data_dir=s3://bucket/photos")
    assert problems("train", "data.data_dir=s3://bucket/photos") == [
        "data.prepare=True: shards are built in local folders, not in s3://bucket/photos"
    ]
    (problem,) = problems("train", "data=raw", "data.data_dir=pipe:rm -r .")
    assert problem == (
        "data.data_dir=pipe:rm -r .: commands are not run; give a folder or an address such as s3://..."
    )


@pytest.mark.parametrize("root", ["train", "evaluate"])
def test_root_is_valid(root):
    assert typed(root)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_valid(option):
    only_evaluate = option.startswith(("report=", "hparams_search="))
    assert typed("evaluate" if only_evaluate else "train", option)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid(experiment):
    assert typed("train", f"experiment={experiment}")
    if "evaluate.py" in (CONF / "experiment" / f"{experiment}.yaml").read_text():
        assert typed("evaluate", f"experiment={experiment}")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_says_what_it_claims(experiment):
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    head = "\n".join(line for line in lines[:9] if line.startswith("# "))
    for word in ("Claim:", "Command", f"experiment={experiment}", "Time:", "Expected:"):
        assert word in head


def test_option_list_is_not_empty():
    assert {"model=tiny", "noise=off", "decoding=default", "trainer=cpu", "logger=none"} <= set(OPTIONS)
    alone = {name for name in EXPERIMENTS if "/" not in name}
    recipes = {"tiny_base", "tiny_1024_base", "tiny_1024_tuned", "tiny_tokenizer", "tiny_tuned", "tiny_clip"}
    policies = {"ceed_teacher", "ceed", "ceed_pure", "ceed_longer"}
    assert alone == {"demo", "smoke", "tarflow", "pccot", *recipes, *policies}
    assert {"study/plain", "study/recipe", "study/tied"} <= set(EXPERIMENTS) - alone


@pytest.mark.parametrize(
    ("root", "overrides", "expected"),
    [
        ("train", ["decoding.window=0"], "decoding.window=0: must be"),
        ("train", ["decoding.window=abc"], "decoding.window='abc': must be a whole number"),
        ("train", ["decoding.window=16.5"], "decoding.window=16.5: must be a whole number"),
        ("train", ["decoding.window=true"], "decoding.window=True: must be a whole number"),
        ("train", ["methods.sjd2.method=sdj2"], "methods.sjd2.method='sdj2': must be 'ar', 'jacobi'"),
        ("train", ["+trainer.max_stps=1"], "trainer.max_stps=1: unknown key; did you mean `max_steps`?"),
        ("train", ["+sead=1"], "sead=1: unknown key; did you mean `seed`?"),
        ("train", ["+noise.ramp.segmnt=1"], "noise.ramp.segmnt=1: unknown key; did you mean `segment`?"),
        ("train", ["optimizer.betas=[0.9]"], "optimizer.betas.1: missing"),
        ("train", ["noise.num_levels=[4,2]"], "noise.num_levels=[4, 2]: must be [fewest, most]"),
        (
            "train",
            ["noise.process.source=tide"],
            "noise.process.source='tide': must be 'gaussian', 'tied', 'tied_white', 'mean' or 'above'",
        ),
        (
            "train",
            ["noise.process.estimate=expected"],
            "noise.process.estimate=expected: needs laws on the way",
        ),
        ("evaluate", ["methods.sjd2.level_rule=x"], "methods.sjd2.level_rule='x': must be 'age', 'stable'"),
        ("evaluate", ["methods.sjd2.confidence=2"], "methods.sjd2.confidence=2.0: must lie in (0, 1]"),
        (
            "evaluate",
            ["methods.sjd2.pairs.table=none.safetensors"],
            "methods.sjd2.pairs.table=none.safetensors: there is no such file",
        ),
        ("evaluate", ["methods.sjd2.pairs.sweeps=0"], "methods.sjd2.pairs.sweeps=0: must be at least 1"),
        (
            "train",
            ["noise.process.state=draft"],
            "noise.process.state=draft: needs drafts; set noise.trajectory",
        ),
        (
            "train",
            ["noise.process.source=tied", "methods.sjd2.acceptance=exact"],
            "noise.process.source=tied: needs acceptance=replay",
        ),
        ("train", ["noise.ramp.segment=[0,2]"], "noise.ramp.segment=[0, 2]: must be [fewest, most]"),
        ("train", ["optimizer.lr=-1"], "optimizer.lr=-1.0: must be greater than 0"),
        ("train", ["trainer.devices=x"], "trainer.devices='x': must be a whole number or must be 'auto'"),
        ("train", ["ckpt_path=gone.ckpt"], "ckpt_path=gone.ckpt: there is no such checkpoint"),
        ("train", ["model.path=gone"], "model.path=gone: no backbone in gone"),
        ("train", ["model.load_onto=auto"], "model.load_onto=auto: must be one device"),
        ("train", ["metrics.clip=gone/clip"], "metrics.clip=gone/clip: there is no such folder"),
        ("evaluate", ["report.num_frames=1"], "report.num_frames=1: must be greater than or equal to 2"),
        ("evaluate", ["report.cost_windows=[0]"], "report.cost_windows.0=0: must be greater than"),
        ("evaluate", ["report.publish=paper"], "report.publish='paper': must be 'none' or 'wandb'"),
        (
            "evaluate",
            ["report.publish=wandb", "logger=none"],
            "report.publish=wandb: a W&B Report shows a W&B run; use logger=wandb, or publish=none",
        ),
        ("train", ["task=clip"], "task=clip: needs the group of keys `clip`; use experiment=tiny_clip"),
        ("train", ["compare=[]"], "compare=[]"),
        ("train", ["seed=${gone}"], "seed: Interpolation key 'gone' not found; give the value itself"),
        ("evaluate", ["compare=[ar,sjd3]"], "compare: unknown method 'sjd3'; did you mean `sjd`?"),
        ("evaluate", ["compare=ar"], "compare='ar': must be a"),
        ("evaluate", ["weights=gone"], "weights=gone: there is no backbone.json"),
        ("evaluate", ["ckpt_path=last"], "ckpt_path=last: there is no such checkpoint"),
        ("evaluate", ["decoding.window=0"], "decoding.window=0: must be"),
        ("evaluate", ["methods.sjd.window=0"], "methods.sjd.window=0: must be at least 1"),
        ("evaluate", ["decoding.sampling.top_p=0"], "decoding.sampling.top_p=0.0: must lie in (0, 1]"),
        ("evaluate", ["methods.sjd.num_levels=2"], "methods.sjd.method=sjd: has no noise"),
        ("evaluate", ["data.prompt_file=gone.txt"], "data.prompt_file=gone.txt: there is no such file"),
        (
            "evaluate",
            ["metrics=coco2017_5k", "metrics.protocol.images=gone"],
            "metrics.protocol.images=gone: there is no such folder; unpack COCO's archives",
        ),
        (
            "evaluate",
            ["metrics=coco2014_30k", "data.prompt_file=weights/tiny/backbone.json"],
            "metrics.protocol: coco2014_30k brings prompts and real images",
        ),
        (
            "evaluate",
            ["benchmark=geneval", "samples_per_prompt=4"],
            "benchmark_prompts=None: there is nothing; give its evaluation_metadata.jsonl",
        ),
        (
            "evaluate",
            ["report.judged=gone.jsonl"],
            "report.judged=gone.jsonl: belongs to a benchmark; set benchmark to geneval, dpg, geneval2",
        ),
        (
            "evaluate",
            ["report.judged=gone.txt", "benchmark=dpg", "benchmark_prompts=weights", "samples_per_prompt=4"],
            "report.judged=gone.txt: must be the --res-path of DPG-Bench's compute_dpg_bench.py",
        ),
        (
            "evaluate",
            ["benchmark=geneval2", "benchmark_prompts=weights", "samples_per_prompt=4"],
            "samples_per_prompt=4: geneval2 judges one image of each prompt; set it to 1",
        ),
        (
            "evaluate",
            ["benchmark=dpg", "benchmark_prompts=weights"],
            "samples_per_prompt=1: dpg judges four images of each prompt",
        ),
    ],
)
def test_a_wrong_value_is_refused(root, overrides, expected):
    found = problems(root, *overrides)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_problems_at_once():
    found = problems(
        "train",
        "decoding.window=0",
        "+decoding.windw=3",
        "trainer.devices=x",
        "ckpt_path=gone",
        "optimizer.lr=0",
        "+callbacks.extra=[{_target_: os.system}]",
        "+foo=1",
    )
    starts = ["decoding.window=", "decoding.windw", "trainer.devices", "ckpt_path", "optimizer.lr", "foo="]
    for start in [*starts, "callbacks.extra.0._target_="]:
        assert len([line for line in found if line.startswith(start)]) == 1, (start, found)
    assert len(found) == len(starts) + 1


@pytest.mark.parametrize(
    "override",
    [
        "+foo._target_=os.system",
        "+data.loader._target_=torch.load",
        "+a.b.c._target_=1",
        "callbacks.extra=[{_target_: lightning.pytorch.callbacks.Callback}]",
        "callbacks.extra=[{_target_: lightning.pytorch.callbacks.Timer, duration: {_target_: os.system}}]",
    ],
)
def test_targets_are_refused_wherever_they_stand(override):
    assert any("this target is not allowed" in line for line in problems("train", override))


def test_a_missing_value_is_named():
    cfg = deepcopy(composed("train"))
    OmegaConf.set_struct(cfg, False)
    del cfg.trainer.max_steps
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: missing; give it a value"):
        train_config(cfg)


def test_an_allowed_target_is_taken():
    config = typed(
        "train", "callbacks.extra=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}]"
    )
    assert config.callbacks.extra[0]["monitor"] == "val/loss"


def test_hydra_refuses_keys_of_the_other_script():
    with pytest.raises(HydraException, match=r"optimizer\.lr"):
        composed("evaluate", "optimizer.lr=1")


def test_decoding_values_hold_for_every_method_that_drafts():
    own = typed("evaluate").methods
    names = [
        "ar",
        "jacobi",
        "sjd",
        "mc_sjd",
        "gumbel",
        "sjd_pp",
        "sjd_pac",
        "gsd",
        "sjd2",
        "sjd2_exact",
        "sjd2_paper",
        "sjd2_pure",
    ]
    values = ("decoding.window=7", "decoding.num_levels=3", "decoding.sampling.top_k=9")
    changed = typed("evaluate", *values, f"compare=[{','.join(names)}]").methods
    assert {name for name, method in changed.items() if method.window == 1} == {"ar"}
    assert {method.window for method in changed.values()} == {1, 7}
    assert {name: method.num_levels for name, method in changed.items()} == {
        "ar": 0,
        "jacobi": 0,
        "sjd": 0,
        "mc_sjd": 0,
        "gumbel": 0,
        "sjd_pp": 0,
        "sjd_pac": 0,
        "gsd": 0,
        "sjd2": 3,
        "sjd2_exact": 3,
        "sjd2_paper": 3,
        "sjd2_pure": 3,
    }
    assert {method.sampling.top_k for method in changed.values()} == {9}
    assert own["sjd2_paper"].num_levels != own["sjd2"].num_levels, "each has its own value otherwise"


def test_all_methods_are_compiled_or_none():
    """A speed-up over a baseline that runs otherwise would be of the compiler."""
    config = typed("evaluate", "decoding.engine=compiled")
    assert all(method.engine == "compiled" for method in config.methods.values())


def test_values_of_one_method():
    methods = typed("evaluate", "methods.sjd2_paper.window=48").methods
    assert methods["sjd2_paper"].window == 48
    assert methods["sjd2"].window != 48


def test_one_method_beside_the_baseline():
    config = typed("evaluate", "compare=[ar,sjd2_exact]", "decoding.window=9", "decoding.sampling.top_k=3")
    assert config.compare == ("ar", "sjd2_exact")
    assert config.methods["sjd2_exact"].window == 9
    assert {method.sampling.top_k for method in config.methods.values()} == {3}


def test_default_methods_are_what_reports_promise():
    config = typed("evaluate")
    assert set(config.compare) >= {"ar", "sjd", "mc_sjd", "sjd2", "sjd2_paper"}
    lossless = {name for name, method in config.methods.items() if method.lossless}
    assert lossless == set(config.methods) - {"gsd", "sjd2_paper", "sjd2_pure"}
    assert config.methods["sjd2"].acceptance == "replay"
    assert typed("train").compare == ("ar", "sjd2")


def test_decoding_uses_the_grid_of_training():
    config = typed("evaluate", "noise.process.schedule=karras", "noise.process.rho=5.0")
    assert {(method.noise.schedule, method.noise.rho) for method in config.methods.values()} == {
        ("karras", 5.0)
    }


def test_saved_configuration_is_resolved_and_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-very-secret-value")
    config = typed("train", "logger.wandb.entity=${oc.env:MY_API_KEY}")
    assert config.logger.wandb.entity == "a-very-secret-value"
    save_config(config, tmp_path / "run" / "train.yaml")
    text = (tmp_path / "run" / "train.yaml").read_text()
    assert "secret-value" not in text
    assert "${" not in text
    saved = yaml.safe_load(text)
    assert saved["methods"]["sjd2"]["noise"] == saved["noise"]["process"]


def test_every_value_has_its_meaning_beside_it():
    """Keys of the groups that people read first carry a comment, themselves or above their block."""
    bare = []
    for group in ("data", "model", "noise", "optimizer", "metrics", "report"):
        for path in (CONF / group).glob("*.yaml"):
            lines = path.read_text().splitlines()
            if "defaults:" in lines or path.stem == "lumina_mgpt":
                continue
            bare += [
                f"{path.name}: {line}"
                for line in lines
                if line and not line.startswith("#") and "#" not in line
            ]
    assert not bare


def test_a_window_of_auto_is_chosen_later():
    config = typed("evaluate", "decoding.window=auto", "auto_window.windows=[2,48]")
    assert config.methods["sjd2"].window == "auto"
    assert config.methods["ar"].window == 1
    with pytest.raises(ValueError, match="choose a window first"):
        config.methods["sjd2"].size  # noqa: B018
    one = typed("evaluate", "methods.sjd2.window=auto").methods
    assert (one["sjd2"].window, one["sjd"].window) == ("auto", 32)
    assert problems("train", "auto_window.windows=[0]")[0].startswith("auto_window.windows.0=0")
    [line] = problems("train", "methods.ar.window=auto")
    assert line == "methods.ar.window=auto: method=ar needs window 1, one slot a pass"
