"""The rooms stand on layers and imports run down: read out of the source."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable

import pytest

from tests.tools.source import PACKAGE, REPO, closure, cycle, imported_names, imports, modules

# A room imports itself and rooms of lower layers; rooms of one layer do not import each other.
LAYERS = (
    {"run"},
    {"noise", "embedding", "masks", "fixed_point"},
    {"metrics", "models"},
    {"data", "decoding"},
    {"training", "evaluation"},
    {"report", "config"},
    {"callbacks", "playground"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
# rooms that are one module; the others are folders
FLOOR = {"noise", "embedding", "masks", "fixed_point", "callbacks"}
# Old addresses of commands, kept for one release: each only hands on to the table of commands.
FORWARDING = {"teacher_samples", "data.prepare", "data.pairs"}
# 120 when the rooms were made; scenes and their judge added nine, engines and invariant layers eight,
# generating and the doctor three, the guard of logging and the owner of a run two, the page to play eight,
# names and captions that all sources share two, what is refused before a run begins four, taming one,
# three families of models seven, their cards and previews two, judge and controls in reports three, sweeps
# and loggers four, codes that are cut-outs two, the way to the hub and back three, a judge's lines one, what
# a backward pass computes again one, the speed of training and its trace two, fixed points and TarFlow seven,
# files for the groups of the model and the trainer two, layers in int8 under an adapter one, more distances
# and scores three, the names of classes one, the cache of keys one,
# the corrector of drafts five, thinking in latents seven: model, thoughts, problems, recipe, ways, runs,
# command, policies of actions eight, the drafter of blocks four,
# what commands and recipes share that learn from own decodings two, the report of other tasks one,
# the gate of an adapter one
MOST_FILES = 225

TORCH_ONLY = ("noise", "embedding", "masks", "fixed_point", "decoding", "models.backbone")
TORCH_ONLY += ("training.batch", "training.noise", "training.states", "training.objective")
LIGHTNING = ("training", "callbacks", "data.datamodule", "cli")
HYDRA = ("cli", "config")
EXTRAS = {  # module: extra and package it asks for
    "playground.tabs": ("play", "gradio"),
    "report.wandb_report": ("reports", "wandb-workspaces"),
    "data.sources.parquet": ("parquet", "pyarrow"),
    "models.rounding": ("quantize", "torchao"),
    "training.optimizer": ("quantize", "torchao"),
    "models.invariant_kernels": ("triton", "triton"),
}
HEAVY = ["lightning", "hydra", "omegaconf", "transformers", "diffusers", "wandb", "webdataset"]


def within(module: str, parts: tuple[str, ...]) -> bool:
    """Whether a module is one of the parts, or lies in one."""
    return any(module == part or module.startswith(part + ".") for part in parts)


def room_of(module: str) -> str:
    """The first part of a module's name; "" for the package itself."""
    return module.partition(".")[0]


def climbs(module: str, target: str) -> bool:
    """Whether an import leads to another room that is not on a lower layer."""
    room, other = room_of(module), room_of(target)
    if module in FORWARDING:
        return other not in ("", room, "__main__")
    return other not in ("", room) and LAYER_OF[other] >= LAYER_OF[room]


def test_every_module_belongs_to_a_layer():
    rooms = {room_of(module) for module in modules() if module not in {"", *FORWARDING}}
    assert rooms | {"__main__"} == set(LAYER_OF), "a room without a layer, or a layer of a room that is gone"


def test_imports_run_down():
    wrong = [
        f"{module} imports {target}"
        for module in modules()
        for target in sorted(imports(module)[0])
        if module and climbs(module, target)
    ]
    assert not wrong


def test_climbing_is_seen():
    assert climbs("data.index", "cli.train")
    assert climbs("models.lora", "metrics.features")
    assert climbs("evaluation.results", "report.table")
    assert not climbs("report.table", "evaluation.results")
    assert not climbs("models.lora", "models.weights")
    assert not climbs("data.prepare", "__main__")
    assert climbs("data.prepare", "training.module")


def test_no_import_cycle():
    assert not cycle()


def test_the_floor_holds_shared_mathematics_and_the_callback():
    root = REPO / PACKAGE
    flat = {path.stem for path in root.glob("*.py")} - {"__init__", "__main__"}
    assert flat <= FLOOR | FORWARDING, "a module outside the rooms"
    assert len(list(root.rglob("*.py"))) <= MOST_FILES


def test_old_addresses_only_hand_on():
    lengths = {
        module: len(modules()[module].read_text().splitlines()) for module in FORWARDING & set(modules())
    }
    assert not {module: length for module, length in lengths.items() if length > 15}


def test_every_rule_names_a_part_that_exists():
    named = {*TORCH_ONLY, *LIGHTNING, *HYDRA, *EXTRAS}
    assert not sorted(part for part in named if not any(within(m, (part,)) for m in modules()))


def test_algorithm_needs_only_torch():
    wrong = [
        f"{module} -> {target}: {', '.join(sorted(extra))}"
        for module in modules()
        if within(module, TORCH_ONLY)
        for target in sorted(closure(module))
        if (extra := imports(target)[1] - {"torch", "jaxtyping", "safetensors"})
    ]
    assert not wrong, "noise, objective and decoding reach packages beside torch and its file format"


@pytest.mark.parametrize(
    ("packages", "homes"),
    [({"lightning"}, LIGHTNING), ({"hydra", "omegaconf"}, HYDRA), ({"pytorch_lightning"}, ())],
    ids=["lightning", "hydra", "pytorch_lightning"],
)
def test_frameworks_stay_at_home(packages, homes):
    wrong = [module for module in modules() if imports(module)[1] & packages and not within(module, homes)]
    assert not wrong, f"{sorted(packages)} may be imported only in {homes}"


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


def test_scripts_are_thin():
    for name in ("train", "evaluate"):
        names = imported_names((REPO / f"{name}.py").read_text())
        assert all(target.startswith(f"{PACKAGE}.cli") for target in names), (
            f"{name}.py imports {sorted(names)}"
        )


def loaded(names: Iterable[str], packages: Iterable[str]) -> str:
    """Which of the packages the import of our modules loads."""
    code = (
        f"import sys, {', '.join(f'{PACKAGE}.{name}' for name in names)}\n"
        f"print([name for name in {list(packages)} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_decoder_loads_without_frameworks():
    assert loaded(TORCH_ONLY, HEAVY) == "[]"


def test_a_configuration_is_printed_and_refused_without_frameworks():
    """`--cfg job` and an error take two seconds, and Lightning, loaded after Hydra, logs through it."""
    packages = ("lightning", "transformers", "diffusers", "wandb", "webdataset", "scipy")
    assert loaded(("cli.train", "cli.evaluate"), packages) == "[]"


def test_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n"
    assert imported_names(source, "p.q") == {"a.b", "c.d", "p.q.e", "p.f.g", "i"}
