"""The command line as people write it: values that Hydra's grammar stumbles over, names of other tools."""

from __future__ import annotations

import difflib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf

from sjd2_lightning.config.reading import conf_dir

_MISSPELT = re.compile(r"Could not override '(?P<key>[^']+)'")
_NO_CHOICE = re.compile(r"Could not find '(?P<group>[^']+)/(?P<name>[^'/]*)'")
_BASES = ("shared", "base")  # files that others build on, no choices of their own
# What other tools call a key: the last part of the name, and the keys that it stands for here.
OTHER_WORDS = {
    **dict.fromkeys(("prompt", "prompts", "prompts_file", "captions"), ("data.prompt_file", "num_prompts")),
    **dict.fromkeys(("learning_rate", "lr_rate", "base_lr", "max_lr"), ("optimizer.lr",)),
    **dict.fromkeys(("wd", "decay"), ("optimizer.weight_decay",)),
    **dict.fromkeys(("warmup", "warmup_ratio"), ("optimizer.warmup_steps",)),
    **dict.fromkeys(
        ("steps", "iterations", "num_steps", "train_steps", "max_train_steps"), ("trainer.max_steps",)
    ),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), ("trainer.max_epochs",)),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "num_devices"), ("trainer.devices",)),
    **dict.fromkeys(("nodes", "nnodes"), ("trainer.num_nodes",)),
    **dict.fromkeys(("fp16", "bf16", "amp", "mixed_precision"), ("trainer.precision",)),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps"), ("trainer.accumulate_grad_batches",)),
    **dict.fromkeys(("grad_clip", "max_grad_norm"), ("trainer.gradient_clip_val",)),
    **dict.fromkeys(("bs", "train_batch_size"), ("data.batch_size", "batch_size")),
    **dict.fromkeys(("workers", "num_data_workers"), ("data.num_workers",)),
    **dict.fromkeys(("dataset", "data_path", "data_root", "train_data_dir"), ("data.data_dir",)),
    **dict.fromkeys(("images", "reference", "references", "real_images"), ("data.reference_dir",)),
    **dict.fromkeys(("out", "output", "output_dir", "out_dir", "save_dir"), ("run_dir", "export_dir")),
    **dict.fromkeys(("resume", "checkpoint", "ckpt", "resume_from_checkpoint"), ("ckpt_path",)),
    **dict.fromkeys(("resolution", "size", "height", "width"), ("model.image_size",)),
    **dict.fromkeys(("model_path", "weights_path", "pretrained"), ("model.path", "weights")),
    **dict.fromkeys(("methods", "sampler", "samplers"), ("compare",)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), ("decoding.sampling.guidance_scale",)),
    **{name: (f"decoding.sampling.{name}",) for name in ("temperature", "top_k", "top_p", "guidance_scale")},
    **dict.fromkeys(("levels", "num_inference_steps"), ("decoding.num_levels",)),
    **dict.fromkeys(("rank", "lora_rank", "r"), ("model.lora.rank",)),
    **dict.fromkeys(("ema",), ("callbacks.ema_decay",)),
    **dict.fromkeys(("wandb_project",), ("logger.wandb.project",)),
}


def program() -> str:
    """How this program was started, to be typed again: `sjd2`, its path, or `python -m sjd2_lightning`."""
    started = Path(sys.argv[0])
    if started.parts[-2:] == ("sjd2_lightning", "__main__.py"):
        return f"{Path(sys.executable).name} -m sjd2_lightning"
    found = shutil.which("sjd2")
    if started.name != "sjd2" or (found is not None and Path(found).samefile(started)):
        return "sjd2"
    here = started.absolute()
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def one_line(message: str) -> str:
    """A message without line breaks and runs of blanks."""
    return " ".join(message.split())


def readable_arguments(script: str, arguments: list[str]) -> list[str]:
    """The command line with values that Hydra's grammar would stumble over in quotes, and `~/` written out.

    A path such as `run_dir=~/x(1)` or `ckpt_path=epoch=0-step=2.ckpt` is one value to everybody but that
    grammar. What Hydra reads as it is stays as it is.

    Raises:
        ValueError: an option that does not exist, or a word that is no KEY=VALUE; the message says how to
            write it.
    """
    parser = get_args_parser()
    known, unknown = parser.parse_known_args(arguments)
    options = [word for word in unknown if word.startswith("-")]
    if options:
        raise ValueError(_instead_of_option(script, options[0], arguments))
    sweeps = known.multirun
    overrides = set(known.overrides)
    return [_readable(word, sweeps) if word in overrides else word for word in arguments]


def _readable(word: str, sweeps: bool) -> str:
    key, sign, value = word.partition("=")
    if not sign and not word.startswith("~"):
        raise ValueError(f"{word}: is no KEY=VALUE; see --help for the keys")
    home = re.compile(r"^~(?=/|$)|(?<=,)~(?=/)" if sweeps else r"^~(?=/|$)")
    value = home.sub(lambda found: str(Path.home()), value)
    if _problem_of(f"{key}{sign}{value}") is None:
        return f"{key}{sign}{value}"
    parts = value.split(",") if sweeps and not value.startswith(("[", "{", "'", '"')) else [value]
    written = [part if _problem_of(f"{key}={part}") is None else _quoted(part) for part in parts]
    quoted = f"{key}{sign}{','.join(written)}"
    starts_a_group = value.startswith(("[", "{", "'", '"'))
    if starts_a_group or _problem_of(quoted) is not None:
        reason = one_line(str(_problem_of(word))).partition(" See https")[0]
        raise ValueError(
            f"{word}: cannot be read ({reason}); write a value with special characters in quotes inside "
            f"quotes, \"{key}='...'\""
        )
    return quoted


def _quoted(value: str) -> str:
    """A value in Hydra's quotes, in which only the quote and backslashes before one are escaped."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _problem_of(override: str) -> HydraException | None:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        return error
    return None


def _instead_of_option(script: str, option: str, arguments: list[str]) -> str:
    name, _, value = option.lstrip("-").partition("=")
    if not value:
        behind = arguments[arguments.index(option) + 1 :]
        value = behind[0] if behind and not behind[0].startswith("-") and "=" not in behind[0] else "VALUE"
    close = close_keys(script, name)
    hint = f"did you mean {' or '.join(f'`{key}={value}`' for key in close)}?" if close else "see --help"
    return f"{option}: no such option; keys are written KEY=VALUE, {hint}"


def with_suggestion(script: str, error: HydraException) -> str:
    """What Hydra says, with the key or choice that was probably meant."""
    message = str(error).strip()
    if isinstance(error, OverrideParseException):
        return f"{message}; write a value with special characters in quotes inside quotes, \"KEY='...'\""
    if choice := _NO_CHOICE.search(message):
        group, name = choice["group"], choice["name"]
        known = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml") if path.stem not in _BASES)
        return (
            f"The configuration has a problem: {group}={name}: no such choice; {did_you_mean_of(name, known)}"
        )
    if misspelt := _MISSPELT.search(message):
        key = misspelt["key"]
        close = close_keys(script, key)
        hint = f"did you mean {' or '.join(f'`{name}`' for name in close)}?" if close else "see --help"
        return f"The configuration has a problem: {key}: unknown key; {hint}"
    return message


def did_you_mean_of(name: str, known: list[str]) -> str:
    """The choices that a name begins or that are close, and all of them."""
    close = [one for one in known if one.startswith(name)] or difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(f'`{one}`' for one in close[:3])}? (" if close else ""
    return f"{hint}known here: {', '.join(known)}{')' if close else ''}"


def close_keys(script: str, name: str) -> list[str]:
    """Up to three keys that a name was probably meant for, best first."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        tree = OmegaConf.to_container(compose(script), resolve=False)
    # each method has every field: their keys are named only to those who ask for a method
    named = name.lower().replace("-", "_").lstrip("+~")
    known = [key for key in _keys(tree) if named.startswith("methods") or not key.startswith("methods.")]
    group, _, last = named.rpartition(".")
    wanted = [key for key in OTHER_WORDS.get(last, ()) if key in known]
    same = [key for key in known if key.rpartition(".")[2] == last]
    whole = difflib.get_close_matches(named, known, n=3)
    ends = {key: key.rpartition(".")[2] for key in known}
    near = difflib.get_close_matches(last, sorted(set(ends.values())), n=2, cutoff=0.75)
    parts = [key for key in known if last in ends[key].split("_")] if len(last) > 2 else []
    found = [*wanted, *same, *whole, *(key for key in known if ends[key] in near), *parts]
    inside = [key for key in found if group and key.startswith(f"{group}.")]
    return list(dict.fromkeys([*inside, *found] if not wanted else [*wanted]))[:3]


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from _keys(value, f"{prefix}{name}.")
