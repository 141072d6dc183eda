"""Says what this machine can do, which models are ready, and how to get the rest.

Loads no weights, opens no connection, and changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import netrc
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sjd2_lightning.config.groups import shipped
from sjd2_lightning.config.reading import model_choices
from sjd2_lightning.models.hub import WeightsSource
from sjd2_lightning.models.weights import BACKBONE_FILE, TRUNK, missing_weights

_GIB = 2**30
_EXTRAS = {  # package that an extra brings: the extra, and what it is for
    "gradio": ("play", "the page of `sjd2 play`"),
    "wandb_workspaces": ("reports", "report.publish=wandb"),
    "torchao": ("quantize", "model.quantize to decode, optimizer=adamw8bit, trainer.fp8"),
    "pyarrow": ("parquet", "`sjd2 prepare hf`"),
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox")


class Finding(NamedTuple):
    """What was looked at, what was found, and what to do about it ("" where nothing needs doing)."""

    name: str
    found: str
    remedy: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    argparse.ArgumentParser(
        prog="sjd2 doctor",
        description=__doc__,
        epilog="example:\n  sjd2 doctor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    for title, findings in (("machine", machine()), ("tools", tools()), ("models", models())):
        print(title)
        for finding in findings:
            print(f"  {finding.name:<18}{finding.found}", flush=True)
            if finding.remedy:
                print(f"  {'':<18}-> {finding.remedy}")


def machine() -> Iterator[Finding]:
    """The machine: processor, memory, disk, device, its number formats and the compiler."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("python", f"{platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    yield Finding("processor", f"{os.cpu_count()} cores, {memory / _GIB:.0f} GiB of memory")
    yield Finding("disk here", f"{shutil.disk_usage('.').free / _GIB:.0f} GiB free")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            free = torch.cuda.mem_get_info(number)[0]
            sizes = f"{found.total_memory / _GIB:.0f} GiB, {free / _GIB:.0f} GiB of it free"
            yield Finding(f"cuda:{number}", f"{found.name}, {sizes}")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        remedy = "" if bf16 else "use model.dtype=float16 for decoding and trainer=default for training"
        yield Finding("bfloat16", "yes" if bf16 else "no", remedy)
        yield Finding("engine", "graphs: compiled layers, captured iterations (decoding.engine=auto)")
    else:
        apple = torch.backends.mps.is_available()
        yield Finding("device", "Apple GPU (mps)" if apple else "no GPU: everything runs on the processor")
        yield Finding("engine", "eager (decoding.engine=auto)")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    yield Finding(
        "compiler",
        compiler or "no C++ compiler",
        "" if compiler else "install g++ for decoding.engine=compiled; nothing else needs it",
    )


def tools() -> Iterator[Finding]:
    """What stands beside the package: W&B, a browser for pages, the packages of extras."""
    login = "WANDB_API_KEY" in os.environ or _has_login("api.wandb.ai")
    yield Finding(
        "W&B",
        "logged in" if login else "not logged in: runs are kept offline",
        "" if login else "wandb login, then logger.wandb.mode=online",
    )
    browser = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    yield Finding("browser", browser or "none found: copy report.html to a machine that has one")
    for package, (extra, purpose) in _EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        remedy = "" if there else f"pip install 'sjd2-lightning[{extra}]'"
        yield Finding(package, f"{'there' if there else 'not there'}, for {purpose}", remedy)


def _has_login(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def models() -> Iterator[Finding]:
    """Every model of `conf/model`: whether its files are here, and the command that gets them."""
    for name, fields in model_choices().items():
        place = shipped(fields["path"])
        source = WeightsSource(fields["path"], fields["hub_id"], fields["revision"], get=fields["get"])
        missing = _missing(place)
        if not missing:
            yield Finding(name, f"ready: model={name} ({fields['path']})")
        else:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            yield Finding(name, f"missing in {fields['path']}: {shown}", source.command())


def _missing(folder: Path) -> list[str]:
    """Files that a folder of weights lacks."""
    if not folder.is_dir():
        return ["the folder"]
    saved = (folder / BACKBONE_FILE).is_file()
    trunk = folder / TRUNK if saved else folder
    tokenizer = folder / ("text/tokenizer.json" if saved else "tokenizer.json")
    names = [f"{trunk.relative_to(folder) / name}" for name in missing_weights(trunk)]
    return names if tokenizer.is_file() else [*names, str(tokenizer.relative_to(folder))]


if __name__ == "__main__":
    main()
