"""What cannot run is refused in one line that names its key, whatever the value: all keys, bad values."""

import importlib.util
import math
import random
import shutil
from collections.abc import Iterable
from copy import deepcopy

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from sjd2_lightning.cli.check import (
    already_done,
    check_evaluate,
    check_train,
    likely_start,
    logged_names,
)
from sjd2_lightning.config.reading import ConfigError, train_config
from sjd2_lightning.config.runs import EvaluateConfig, TrainConfig
from sjd2_lightning.data.index import Shard, ShardIndex, ShardMeta
from sjd2_lightning.training.checkpoints import progress_of
from sjd2_lightning.training.optimizer import build_optimizer, warmup_cosine
from tests.evaluation.test_references import tiny_coco
from tests.tools.configurations import composed, put_named_files, typed

BAD = (None, "", [], {}, -1, 0, 10**30, 1e300, math.nan, "nonsense", True, [[1]], {"a": 1}, "${oc.env:NOPE}")
# A root, and the choices under which groups that are null otherwise have keys.
ROOTS = {
    "train": ("train",),
    "train, clip": ("train", "experiment=tiny_clip"),
    "train, tokenizer": ("train", "experiment=tiny_tokenizer"),
    "train, base": ("train", "experiment=tiny_base"),
    "train, flow": ("train", "experiment=tarflow"),
    "train, thoughts": ("train", "experiment=pccot"),
    "train, policy": ("train", "experiment=ceed_teacher"),
    "evaluate": ("evaluate",),
    "evaluate, flow": ("evaluate", "experiment=tarflow"),
    "evaluate, thoughts": ("evaluate", "experiment=pccot"),
    "evaluate, policies": ("evaluate", "experiment=ceed"),
    "evaluate, coco": (
        "evaluate",
        "metrics=coco2017_5k",
        "metrics.allow_download=true",
        "metrics.protocol.num_images=3",
    ),
}
FURTHER = {"train, clip": "clip", "train, tokenizer": "tokenizer", "train, base": "model.scratch"}
FURTHER |= {"evaluate, coco": "metrics.protocol", "train, flow": "tarflow", "evaluate, flow": "flow"}
FURTHER |= {"train, thoughts": "pccot", "evaluate, thoughts": "thoughts"}
FURTHER |= {"train, policy": "ceed", "evaluate, policies": "policies"}
_METHODS = ("methods.ar.", "methods.sjd2.", "methods.sjd2_exact.")  # the others have the same fields


@pytest.fixture(autouse=True)
def named_files(tmp_path, monkeypatch):
    """What a shipped configuration names is there, scorer and tokenizer of captions included."""
    put_named_files(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "data/coco")
    tiny_coco(tmp_path / "data/coco")
    (tmp_path / "weights/tiny/clip/open_clip_model.safetensors").touch()
    (tmp_path / "weights/tiny/text").mkdir()
    (tmp_path / "weights/tiny/text/tokenizer.json").write_text("{}")
    monkeypatch.setattr("sjd2_lightning.metrics.alignment.check_clip", lambda *named: "")


def keys_of(node, prefix=""):
    """Every key of a tree, groups before what they hold."""
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def keys_under(root: str) -> list[str]:
    """The keys that are tried under a root: all of its script, or those of the group that it brings."""
    tree = OmegaConf.to_container(composed(*ROOTS[root]), resolve=False)
    fields = (TrainConfig if root.startswith("train") else EvaluateConfig).model_fields
    keys = [key for key in keys_of(tree) if key.partition(".")[0] in fields]
    if root in FURTHER:
        return [key for key in keys if key.startswith(FURTHER[root])]
    return [
        key
        for key in keys
        if key.count(".") < 2 or not key.startswith("methods.") or key.startswith(_METHODS)
    ]


def outcome(root: str, key: str, value: object) -> object:
    """The typed configuration under a value, or the error that it is refused with."""
    cfg = deepcopy(composed(*ROOTS[root]))
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    try:
        return (check_train if root.startswith("train") else check_evaluate)(cfg)
    except ConfigError as error:
        return error


def assert_refused_or_usable(root: str, key: str, value: object) -> None:
    """One line that names the key, or values that nothing stumbles over."""
    found = outcome(root, key, value)
    if isinstance(found, ConfigError):
        assert all("\n" not in line and len(line) < 600 for line in found.problems), found.problems
        parts = key.split(".")
        named = [key, *(".".join(parts[:count]) + "=" for count in range(1, len(parts)))]
        lines = found.problems
        assert any(name in line for line in lines for name in named), (key, value, lines)
        return
    L.seed_everything(found.seed, verbose=False)
    for method in found.methods.values():
        method.noise.grid(method.num_levels)
        method.sampling.scales(9)
    if isinstance(found, TrainConfig):
        parameter = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = build_optimizer([("a", parameter)], found.optimizer)
        schedule = warmup_cosine(optimizer, found.optimizer, 10)
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        schedule.step()


def tries(roots: Iterable[str] = ROOTS, seed: int = 0) -> list[tuple[str, str, object]]:
    """Every key of roots with every bad value, in random order."""
    found = [(root, key, value) for root in roots for key in keys_under(root) for value in BAD]
    random.Random(seed).shuffle(found)
    return found


def test_a_sample_of_bad_values():
    drawn = tries(("train", "evaluate"))
    assert len(drawn) > 5000
    for root, key, value in drawn[:12]:
        assert_refused_or_usable(root, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_every_key_with_every_bad_value(part):
    for root, key, value in tries()[part::10]:
        assert_refused_or_usable(root, key, value)


@pytest.mark.parametrize(
    ("root", "key", "value", "line"),
    [
        ("train", "seed", 2**32, "seed=4294967296: must be less than or equal to 4294967295"),
        ("train", "run_dir", "", "run_dir='': must not be empty"),
        ("train", "run_dir", None, "run_dir=None: must be a string"),
        ("train", "run_dir", [], "run_dir=[]: must be a string"),
        ("train", "export_dir", "weights/tiny/backbone.json/x", "export_dir=weights/tiny/backbone.json/x: "),
        ("train", "export_dir", "a" * 256, f"export_dir={'a' * 40}...: a name is too long"),
        ("train", "model.family", "chamaeleon", "model.family=chamaeleon: no such family; did you mean"),
        ("train", "model.image_size", 64, "model.image_size=64: must be a list: [A, B, ...]"),
        ("train", "model.lora.rank", -1, "model.lora.rank=-1: must be at least 1"),
        ("train", "model.lora.targets", [], "model.lora.targets=[]: give at least one"),
        ("train", "model.unconditional", "none", "model.unconditional=none: must be one of boi, empty"),
        ("train", "decoding.window", [], "decoding.window=[]: must be a whole number or must be 'auto'"),
        ("train", "noise.process.t_min", -1, "noise.process.t_min=-1.0: must lie in (0, 1)"),
        ("train", "noise.process", [], "noise.process=[]: must be a group of keys"),
        ("train", "model", [], "model=[]: must be a group of keys"),
        ("train", "optimizer.lr", 1e300, "optimizer.lr=1e+300: must be at most 100"),
        ("train", "optimizer.weight_decay", 1e300, "optimizer.weight_decay=1e+300: must be at most 1000"),
        ("train", "trainer.strategy", "dpp", "trainer.strategy=dpp: no such strategy; did you mean `ddp`?"),
        ("train", "trainer.devices", 10**6, "trainer.devices=1000000: must be less than or equal to 1024"),
        ("train", "trainer.num_nodes", 2, "trainer.num_nodes=2: nothing says where the other machines are"),
        ("train", "trainer.max_steps", -1, "trainer.max_steps=-1: needs trainer.max_epochs, which is -1"),
        ("train", "trainer.accumulate_grad_batches", 10**10, "trainer.accumulate_grad_batches=10000000000: "),
        ("train", "callbacks.checkpoint.save_top_k", 2, "callbacks.checkpoint.save_top_k=2: needs"),
        ("train", "callbacks.checkpoint.monitor", "banana", "callbacks.checkpoint.monitor=banana: nothing"),
        ("train", "callbacks.checkpoint.monitor", "val/los_clean", "callbacks.checkpoint.monitor=val/los"),
        ("train", "callbacks.extra", [{}], "callbacks.extra.0={}: is no callback"),
        ("train", "data.views", 10**6, "data.views=1000000: must be at most 256"),
        ("train", "data.num_workers", 500, "data.num_workers=500: this machine has"),
        ("train", "data.prompt_file", "${oc.env:NOPE}", "data.prompt_file: Environment variable 'NOPE'"),
        ("train, tokenizer", "tokenizer.num_grounds", 2048, "tokenizer.num_grounds=2048: must be less"),
        ("train, clip", "clip.text_dir", "gone", "clip.text_dir=gone: there is no tokenizer.json"),
        ("evaluate", "methods.ar.window", 3, "methods.ar.window=3: method=ar needs window 1"),
        ("evaluate", "decoding.sampling.guidance_end", 0, "decoding.sampling.guidance_end=0.0: must be"),
        ("evaluate", "logger.wandb.project", "a/b", "logger.wandb.project='a/b': "),
    ],
)  # fmt: skip
def test_what_a_bad_value_is_told(root, key, value, line):
    found = outcome(root, key, value)
    assert isinstance(found, ConfigError), f"{key}={value!r} is accepted"
    assert len(found.problems) == 1
    assert found.problems[0].startswith(line), found.problems[0]


def test_callbacks_are_made_once_before_training():
    timer = {"_target_": "lightning.pytorch.callbacks.Timer"}
    assert outcome("train", "callbacks.extra", [timer]).callbacks.extra == [timer]
    [line] = outcome("train", "callbacks.extra", [timer | {"banana": 1}]).problems
    assert line.startswith("callbacks.extra.0: ")
    assert "banana" in line


def test_a_metric_that_is_logged_may_choose_checkpoints():
    names = logged_names(train_config(composed("train")))
    assert {"val/loss_clean", "val/nfe", "val/nfe_ar", "val/clip_gain"} <= set(names)
    assert "val/kid_EffNetLite0" not in names, "of 8 samples no distance is measured"
    many = train_config(composed("train", "callbacks.sampling.num_prompts=24"))
    assert "val/kid_EffNetLite0" in logged_names(many)
    for name in names[:5]:
        assert outcome("train", "callbacks.checkpoint.monitor", name).callbacks.checkpoint.monitor == name


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    [line] = outcome("train", "trainer.accelerator", "gpu").problems
    assert line == "trainer.accelerator=gpu: this machine has none; use trainer=cpu or trainer=auto"
    [line] = outcome("evaluate", "device", "cuda").problems
    assert line.startswith("device=cuda: this machine has none")
    [line] = outcome("evaluate", "model.load_onto", "cuda:0").problems
    assert line.startswith("model.load_onto=cuda:0: this machine has none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    [line] = outcome("train", "trainer.devices", 3).problems
    assert line == "trainer.devices=3: this machine has room for 2 GPUs"


def finished(folder, step: int, max_epochs: int = 0):
    """A checkpoint at a step, as Lightning writes it, in the run `folder`."""
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    epochs = {"fit_loop": {"epoch_progress": {"current": {"completed": max_epochs}}}}
    torch.save({"global_step": step, "loops": epochs, "state_dict": {"w": torch.ones(3)}}, path)
    return path


def test_a_finished_run_says_so(tmp_path):
    path = finished(tmp_path / "runs/a", step=300)
    export = tmp_path / "runs/a/model/backbone.json"
    export.parent.mkdir()
    export.touch()

    def said(*overrides: str):
        config = typed("train", "trainer.max_steps=300", *overrides)
        return already_done(config, likely_start(config))

    own = f"run_dir={tmp_path}/runs/a"
    with pytest.raises(ConfigError, match=r"last.ckpt is at step 300 of 300; raise trainer.max_steps to"):
        said(own, "ckpt_path=last")
    with pytest.raises(ConfigError, match="is at step 300 of 300"):
        said(own, f"ckpt_path={path}")
    with pytest.raises(ConfigError, match="is at step 300 of 300"):
        said(f"run_dir={tmp_path}/runs/b", "ckpt_path=last")
    assert "Nothing was done" in said(own, "ckpt_path=auto"), "the same command may be given again"
    assert said(own, "ckpt_path=auto", "trainer.max_steps=301") is None
    assert said(own) is None, "without ckpt_path it begins anew"
    assert said(f"run_dir={tmp_path}/runs/b", "ckpt_path=auto") is None
    export.unlink()
    assert said(own, "ckpt_path=auto") is None, "it was killed before its weights were written"
    assert said(own, "ckpt_path=last") is None


def test_a_run_of_epochs_that_is_finished_says_so(tmp_path):
    path = finished(tmp_path / "runs/a", step=300, max_epochs=3)
    wanted = ["trainer.max_steps=-1", f"ckpt_path={path}", "run_dir=elsewhere"]
    config = typed("train", *wanted, "trainer.max_epochs=3")
    with pytest.raises(ConfigError, match=r"is at epoch 3 of 3; raise trainer.max_epochs"):
        already_done(config, likely_start(config))
    config = typed("train", *wanted, "trainer.max_epochs=4")
    assert already_done(config, likely_start(config)) is None


def test_progress_of_a_damaged_checkpoint_is_left_to_its_reader(tmp_path):
    path = finished(tmp_path / "runs/a", step=7)
    assert progress_of(path) == (7, 0)
    path.write_bytes(path.read_bytes()[:200])
    assert progress_of(path) == (0, 0)
    assert progress_of(tmp_path) == (0, 0)


def test_data_are_refused_before_anything_is_loaded(tmp_path, tiny_weights):
    for name in ("trunk/config.json", "tokenizer/patch_tokenizer.json"):
        (tmp_path / "weights/tiny" / name).parent.mkdir(exist_ok=True)
        shutil.copy(tiny_weights / name, tmp_path / "weights/tiny" / name)

    def lines(*overrides: str) -> list[str]:
        cfg = deepcopy(composed("train", "data=shards"))
        try:
            check_train(OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides))))
        except ConfigError as error:
            return error.problems
        return []

    [line] = lines("data.data_dir=mine")
    assert line.startswith("data.data_dir=mine: No shards in mine/codes/train: index.json is missing")
    for split in ("train", "val"):
        folder = tmp_path / "mine/codes" / split
        folder.mkdir(parents=True)
        (folder / "a.tar").touch()
        meta = ShardMeta("codes", split, "folder", 16, 16, "", "", num_codes=2048, tokenizer_hash="x")
        ShardIndex(folder, meta, (Shard("a.tar", "", 0, 20),)).save(folder)
    assert lines("data.data_dir=mine") == []
    [line] = lines("data.data_dir=mine", "model.image_size=[96,96]")
    assert "mine/codes/train holds images of 16x16 codes, the model draws 12x12" in line
    [line] = lines("data.data_dir=mine", "data.batch_size=21")
    assert line.startswith("data.batch_size=21: 20 training samples do not fill one batch of 21")
    [line] = lines("data.data_dir=mine", "model.image_size=[65,64]")
    assert line == "model.image_size=[65, 64]: must be multiples of 8"
    (tmp_path / "mine/codes/val/a.tar").unlink()
    [line] = lines("data.data_dir=mine")
    assert "mine/codes/val lacks 1 of the 1 shards" in line


def test_prompts_and_references_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "p.txt").write_text("red\nred")
    (tmp_path / "empty").mkdir()
    [line] = outcome("evaluate", "data.prompt_file", "p.txt").problems
    assert line.startswith("data.prompt_file=p.txt: ")
    assert "'red' occurs 2 times" in line
    [line] = outcome("evaluate", "num_prompts", 10**6).problems
    assert line.startswith("num_prompts=1000000: ")
    [line] = outcome("train", "callbacks.sampling.num_prompts", 10**6).problems
    assert line.startswith("callbacks.sampling.num_prompts=1000000: ")
    [line] = outcome("evaluate", "data.reference_dir", "empty").problems
    assert line.startswith("data.reference_dir=empty: holds 0 files")


def test_what_needs_torchao_or_another_card_is_refused_in_one_line_also_fp8(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else find(name))
    refused = []
    for asked in (["optimizer=adamw8bit"], ["trainer.fp8=true", "trainer.precision=bf16-mixed"]):
        with pytest.raises(ConfigError) as error:
            check_train(composed("train", *asked))
        refused.append([line for line in error.value.problems if line.startswith(asked[0].split("=")[0][:9])])
    [[states], [card, package]] = refused
    assert states.startswith("optimizer.name=adamw8bit: torchao is not installed; `pip install")
    assert card.startswith(
        "trainer.fp8=true: this machine has no card with fp8 (NVIDIA's from Ada and Hopper"
    )
    assert package.startswith("trainer.fp8=true: torchao is not installed; `pip install")
    with pytest.raises(ConfigError) as error:
        check_train(composed("train", "trainer.attention=flex"))
    assert "trainer.attention=flex: FlexAttention trains on CUDA alone" in str(error.value)
