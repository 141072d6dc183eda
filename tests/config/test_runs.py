"""What Hydra prints is what runs, for every experiment and method; every method takes every field."""

from dataclasses import asdict, is_dataclass
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from sjd2_lightning.cli.evaluate import weights_name
from sjd2_lightning.config.groups import Group
from sjd2_lightning.config.reading import evaluate_config, train_config
from sjd2_lightning.config.runs import EvaluateConfig, TrainConfig
from sjd2_lightning.noise import NoiseProcess
from sjd2_lightning.run.provenance import write_trainings
from tests.tools.configurations import CONF, EXPERIMENTS, composed, problems, put_named_files, typed


@pytest.fixture(autouse=True)
def named_files(tmp_path, monkeypatch):
    """What a shipped configuration names is there."""
    put_named_files(tmp_path, monkeypatch)


METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem != "base")


def plain(value):
    """A typed value as JSON holds it: groups and dataclasses as objects, tuples as lists."""
    if is_dataclass(value):
        return plain(asdict(value))
    if isinstance(value, Group):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def printed(root: str, *overrides: str) -> dict:
    """What `--cfg job --resolve` prints, without the keys of the other script."""
    tree = OmegaConf.to_container(composed(root, *overrides), resolve=True)
    fields = (TrainConfig if root == "train" else EvaluateConfig).model_fields
    return {name: value for name, value in tree.items() if name in fields}


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
@pytest.mark.parametrize("root", ["train", "evaluate"])
def test_what_hydra_prints_is_what_runs(root, experiment):
    overrides = [] if experiment is None else [f"experiment={experiment}"]
    read = train_config if root == "train" else evaluate_config
    if root == "evaluate" and experiment is not None:
        text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
        if "evaluate.py" not in text:
            pytest.skip("an experiment of training alone")
    assert plain(read(composed(root, *overrides))) == printed(root, *overrides)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_asked_of_a_method_is_what_runs(method):
    asked = [
        f"compare=[{','.join(dict.fromkeys(['ar', method]))}]",
        "noise=trajectory",
        "decoding.window=16",
        f"methods.{method}.confidence=0.5",
        "decoding.sampling.top_k=7",
    ]
    config = evaluate_config(composed("evaluate", *asked))
    assert plain(config) == printed("evaluate", *asked)
    found = config.methods[method]
    assert (found.window, found.confidence) == (1 if method == "ar" else 16, 0.5)
    assert found.noise == config.noise.process == NoiseProcess(source="mean", state="draft")
    assert found.sampling.top_k == 7


@pytest.mark.parametrize("override", ["methods.sjd2_exact.level_rule=stable", "methods.sjd.tree.width=2"])
def test_every_method_takes_every_field(override):
    key, _, value = override.partition("=")
    node = plain(evaluate_config(composed("evaluate", override)))
    for part in key.split("."):
        node = node[part]
    assert str(node) == value


@pytest.mark.parametrize(
    "group", sorted({path.parent.name for path in CONF.glob("*/*.yaml")} - {"experiment", "hparams_search"})
)
def test_keys_of_a_group_stand_in_its_base_file_or_in_none(group):
    """A base file builds on no other; a key that a file alone has could not be set for the others."""
    files = {path.stem: yaml.safe_load(path.read_text()) or {} for path in (CONF / group).glob("*.yaml")}
    roots = {name for name, keys in files.items() if "defaults" not in keys}
    known = set().union(*(files[name] for name in roots))
    for name, keys in files.items():
        assert set(keys) - {"defaults"} <= known, f"conf/{group}/{name}.yaml"


def test_a_method_that_is_not_compared_need_not_suit_the_training():
    tied = typed("evaluate", "noise.process.source=tied", "compare=[ar,sjd2]")
    assert tied.methods["sjd2_exact"].noise.source == "tied"
    [line] = problems("evaluate", "noise.process.source=tied", "compare=[ar,sjd2,sjd2_exact]")
    assert line == "noise.process.source=tied: needs acceptance=replay; use gaussian"


def test_methods_that_are_compared_share_law_and_compiler():
    [line] = problems("evaluate", "methods.sjd2.sampling.top_k=3")
    assert line.startswith("methods.sjd2.sampling.top_k=3: differs from methods.ar.sampling.top_k=0, so")
    [line] = problems("evaluate", "methods.sjd2.engine=compiled")
    assert line.endswith("set decoding.engine")


def test_rounded_weights_are_decoded_or_lie_under_an_adapter():
    assert typed("evaluate", "model.quantize=int8").model.quantize == "int8"
    assert typed("train", "model.quantize=int8", "model.peft=lora").model.quantize == "int8"
    [line] = problems("train", "model.quantize=int8")
    assert line.startswith("model.quantize=int8: rounded weights cannot be trained; model.peft=lora trains")
    [line] = problems("train", "model.quantize=fp8", "model.peft=lora")
    assert line.endswith("set model.quantize=int8, or null")
    [line] = problems("train", "model.quantize=int8", "model.peft=lora", "trainer=fsdp")
    assert line.endswith("use trainer=ddp")
    [line] = problems("evaluate", "model.quantize=int8", "model.peft=lora")
    assert line.startswith("model.quantize=int8: an adapter is not rounded with its base")
    assert typed(
        "evaluate", "model.quantize=int8", "model.peft=lora", "model.lora.noisy_only=true"
    ).model.quantize
    assert typed("train", "model.quantize=int8", "print_plan=true").print_plan


def test_an_adapter_of_noise_needs_noise():
    asked = ("model.peft=lora", "model.lora.noisy_only=true")
    assert typed("train", *asked).model.lora.noisy_only
    [line] = problems("train", *asked, "noise=off")
    assert line.startswith("model.lora.noisy_only=true: without noise (noise.enabled=false) it would learn")


def test_what_fp8_and_flexible_attention_do_not_go_with(monkeypatch):
    assert typed("train", "trainer.fp8=true", "trainer.precision=bf16-mixed").trainer.fp8
    [line] = problems("train", "trainer.fp8=true")
    assert line.startswith("trainer.fp8=true: is rounded from bfloat16, and trainer.precision=32-true")
    [line] = problems("train", "trainer.fp8=true", "trainer.precision=bf16-mixed", "model.peft=lora")
    assert line.startswith("trainer.fp8=true: is for training all weights")
    [line] = problems("train", "optimizer=adamw8bit", "trainer=fsdp")
    assert line.startswith("optimizer.name=adamw8bit: its states are not written")
    trainer = typed("train").trainer
    assert not trainer.attends_flexibly(10**6), "on a CPU"
    assert typed("train", "trainer.attention=flex").trainer.attends_flexibly(1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    compiled = typed("train", "trainer.compile=true").trainer
    assert [compiled.attends_flexibly(length) for length in (4095, 4096)] == [False, True]


@pytest.mark.parametrize(
    "model", ["lumina_mgpt", "lumina_mgpt_1024", "emu3", "janus_pro", "simple_ar", "glm_image", "tiny"]
)
def test_a_model_of_random_weights_alone_is_a_dry_run(model):
    config = typed("train", f"model={model}", "model.init=random_tiny")
    assert max(config.model.image_size) <= 64
    assert (config.data.max_images, config.data.views, config.data.batch_size) == (8, 1, 2)
    assert config.data.data_dir == f"data/dry_run/{config.model.family}", "other sets are left alone"
    assert (config.trainer.max_steps, config.callbacks.sampling.num_prompts) == (2, 2)
    assert typed("evaluate", f"model={model}", "model.init=random_tiny").num_prompts == 2
    asked = typed("train", f"model={model}", "model.init=random_tiny", "trainer.max_steps=5", "data.views=3")
    assert (asked.trainer.max_steps, asked.data.views, asked.data.max_images) == (5, 3, 8)


def test_no_other_run_is_a_dry_run():
    config = typed("train")
    assert (config.trainer.max_steps, config.data.views, config.data.max_images) == (400, 1, None)
    assert (config.data.data_dir, config.data.batch_size) == ("data/scenes_small", 16)
    assert typed("evaluate").num_prompts is None
    assert typed("evaluate", "model=lumina_mgpt").model.image_size == (768, 768)


def test_random_weights_are_called_that(tmp_path):
    config = typed("evaluate", "model=lumina_mgpt", "model.init=random_tiny", "logger.wandb.tags=[mine]")
    name = "random_tiny (a shrunken chameleon, random weights)"
    assert weights_name(config, Path(config.model.path)) == name
    assert weights_name(config, Path("runs/a/model")) == f"runs/a/model, trained from {name}"
    assert config.wandb_tags == ("mine", "random weights")
    own = typed("evaluate")
    assert (weights_name(own, Path("weights/tiny")), own.wandb_tags) == ("weights/tiny", ())
    write_trainings(tmp_path, [{"random": name}, {"steps": 3, "noise": {}}])
    assert weights_name(own, tmp_path) == f"{tmp_path}, trained from {name}", "without the key too"
    write_trainings(tmp_path, [{"steps": 3, "noise": {}}])
    assert weights_name(own, tmp_path) == str(tmp_path)
