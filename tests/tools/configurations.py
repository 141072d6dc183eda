"""Composed and typed configurations for tests."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sjd2_lightning.config.reading import ConfigError, conf_dir, evaluate_config, train_config
from sjd2_lightning.config.runs import SharedConfig

CONF = conf_dir()
EXPERIMENTS = sorted(
    str(path.relative_to(CONF / "experiment").with_suffix(""))
    for path in (CONF / "experiment").rglob("*.yaml")
    if path.stem != "shared"
)
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.stem not in ("shared", "base") and path.parent.name not in ("experiment", "method")
)
# What configurations name but this checkout need not hold.
NAMED_FILES = (
    "weights/tiny_plain/backbone.json",
    "weights/tiny_plain/tokenizer/patch_tokenizer.json",
    "weights/tiny/backbone.json",
    "weights/tiny_1024/backbone.json",
    "weights/tiny/pairs.safetensors",
    "weights/tiny/tokenizer/patch_tokenizer.json",
    "weights/tiny/clip/open_clip_config.json",
    *(f"weights/lumina_mgpt_7b_{size}/backbone.json" for size in (512, 768, 1024)),
    *(f"weights/{name}/config.json" for name in ("emu3_gen", "janus_pro_1b", "janus_pro_7b")),
    *(f"weights/simple_ar/simplear_{size}B_rl/config.json" for size in (0.5, 1.5)),
    "weights/glm_image/model_index.json",
    *(f"weights/{name}/backbone.json" for name in ("llamagen", "llamagen_class")),
    "outputs/tiny_1024_plain/backbone.json",
    "outputs/demo/model/backbone.json",
    "outputs/smoke/model/backbone.json",
    "outputs/study/small_base/model/backbone.json",
    *(f"outputs/ceed/seed_0/{name}/model/policy.json" for name in ("teacher", "longer", "pure", "mixed")),
    *(f"data/coco/annotations/captions_val{year}.json" for year in (2014, 2017)),
    *(f"data/coco/val{year}/a.jpg" for year in (2014, 2017)),
)


def put_named_files(tmp_path, monkeypatch):
    """Goes into a folder in which everything that a shipped configuration names is there."""
    monkeypatch.chdir(tmp_path)
    for name in NAMED_FILES:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")


@cache
def composed(root: str, *choices: str) -> DictConfig:
    """A root under choices of groups, as Hydra composes it: half a second, so once each."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, list(choices))


def typed(root: str, *overrides: str) -> SharedConfig:
    """The typed configuration of a root under overrides, those of groups first."""
    choices = [override for override in overrides if (CONF / override.partition("=")[0]).is_dir()]
    values = [override.lstrip("+") for override in overrides if override not in choices]
    cfg = deepcopy(composed(root, *choices))
    OmegaConf.set_struct(cfg, False)
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(values))
    return (train_config if root == "train" else evaluate_config)(cfg)


def problems(root: str, *overrides: str) -> list[str]:
    """The lines of the error that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        typed(root, *overrides)
    return caught.value.problems
