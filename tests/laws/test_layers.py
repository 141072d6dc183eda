"""Imports run one way: CONTRIBUTING's rules, read out of the source."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib

import pytest

from tests.tools.source import PACKAGE, REPO, closure, cycle, imported_names, imports, modules

ALGORITHM = ("noise", "posterior", "embedding", "masks", "sequence", "trajectory", "objective", "code_pairs")
TORCH_ONLY = (*ALGORITHM, "decoding", "models.backbone", "models.cache")
LIGHTNING = ("module", "callbacks", "data.datamodule", "recipes", "cli")
LIGHTNING += ("checkpoints", "guards", "resuming", "sharding")
HYDRA = ("cli", "config")
EXTRAS = {  # module: extra and package it asks for
    "report.wandb_report": ("reports", "wandb-workspaces"),
    "data.hf_source": ("parquet", "pyarrow"),
}
HEAVY = ["lightning", "hydra", "omegaconf", "transformers", "diffusers", "wandb", "webdataset"]

# What each part may not import, beside the rules above: nothing looks up, from the algorithm to the scripts.
ENTRY = ("config", "config_groups", "config_model", "config_recipes", "config_base", "cli")
RUN = ("module", "callbacks", "recipes", *ENTRY)
MEASURE = (
    *("evaluation", "comparison", "generation", "quality", "references", "prompts", "ranks", "report"),
    *("flops", "protocols", "benchmarks", "window_choice", "likelihood"),
    "teacher_samples",
)
ABOVE = (*MEASURE, *RUN)
FORBIDDEN = {
    **dict.fromkeys(ALGORITHM, ("decoding", "data", "metrics", "records", *ABOVE)),
    "models": ("decoding", "data", "metrics", "records", *ABOVE),
    "decoding": ("data", "metrics", "records", *ABOVE),
    "data": ("decoding", "metrics", "records", *ABOVE),
    "records": ("models", "decoding", "data", "metrics", *ABOVE),
    "metrics": ("models", "decoding", "data", *ABOVE),
    **dict.fromkeys(MEASURE, RUN),
    "module": ("decoding", "metrics", *MEASURE, "callbacks", "recipes", *ENTRY),
    "callbacks": ("recipes", *ENTRY),
    **dict.fromkeys(
        ("optimizer", "checkpoints", "guards", "resuming", "launched", "sharded_index"),
        ("models", "decoding", "data", "metrics", *MEASURE, *RUN),
    ),
    "sharding": ("models", "decoding", "data", "metrics", *MEASURE, "callbacks", "recipes", *ENTRY),
    "recipes": ENTRY,
    "config": ("recipes", "cli"),
    "config_groups": ("recipes", "cli"),
    "config_model": ("recipes", "config", "config_groups", "cli"),
    "config_recipes": ("models", "recipes", "config", "config_groups", "config_model", "cli"),
    "config_base": ("models", "recipes", "config", "config_groups", "config_model", "config_recipes", "cli"),
}


def within(module: str, parts: tuple[str, ...]) -> bool:
    """Whether a module is one of the parts, or lies in one."""
    return any(module == part or module.startswith(part + ".") for part in parts)


def test_every_rule_names_a_part_that_exists():
    named = {*TORCH_ONLY, *LIGHTNING, *HYDRA, *FORBIDDEN}
    assert not sorted(part for part in named if not any(within(m, (part,)) for m in modules()))


def test_every_module_has_a_rule():
    assert not [module for module in modules() if module and not within(module, (*FORBIDDEN, "cli"))]


def test_algorithm_needs_only_torch():
    wrong = [
        f"{module} -> {target}: {', '.join(sorted(extra))}"
        for module in modules()
        if within(module, TORCH_ONLY)
        for target in sorted(closure(module))
        if (extra := imports(target)[1] - {"torch", "jaxtyping", "safetensors"})
    ]
    assert not wrong, (
        "noise, embedding, objective and decoding reach packages beside torch and its file format"
    )


@pytest.mark.parametrize(
    ("packages", "homes"),
    [({"lightning"}, LIGHTNING), ({"hydra", "omegaconf"}, HYDRA), ({"pytorch_lightning"}, ())],
    ids=["lightning", "hydra", "pytorch_lightning"],
)
def test_frameworks_stay_at_home(packages, homes):
    wrong = [module for module in modules() if imports(module)[1] & packages and not within(module, homes)]
    assert not wrong, f"{sorted(packages)} may be imported only in {homes}"


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_run_one_way(part):
    wrong = [
        f"{module} imports {target}"
        for module in modules()
        if within(module, (part,))
        for target in sorted(imports(module)[0])
        if within(target, FORBIDDEN[part])
    ]
    assert not wrong


def test_imported_packages_are_declared():
    """What the package imports, a plain installation brings (pydantic pins its core), but for extras."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    declared = {"pydantic-core"} | {
        re.match(r"[\w-]+", line)[0].replace("_", "-").lower() for line in project["dependencies"]
    }
    for extra, package in EXTRAS.values():
        assert any(line.startswith(package) for line in project["optional-dependencies"][extra])
    owners = importlib.metadata.packages_distributions()
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in sorted(imports(module)[1])
        if name.replace("_", "-") != EXTRAS.get(module, ("", ""))[1]
        and not declared & {owner.replace("_", "-").lower() for owner in owners.get(name, [name])}
    ]
    assert not wrong


def test_no_import_cycle():
    assert not cycle()


def test_scripts_are_thin():
    for name in ("train", "evaluate"):
        names = imported_names((REPO / f"{name}.py").read_text())
        assert all(target.startswith(f"{PACKAGE}.cli") for target in names), (
            f"{name}.py imports {sorted(names)}"
        )


def test_decoder_loads_without_frameworks():
    code = (
        f"import sys, {', '.join(f'{PACKAGE}.{name}' for name in TORCH_ONLY)}\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n"
    assert imported_names(source, "p.q") == {"a.b", "c.d", "p.q.e", "p.f.g", "i"}
