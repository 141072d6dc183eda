"""The engine on a GPU: what a pass costs, how near it comes to the bus, and what replay promises there.

    .venv/bin/python benchmarks/gpu.py --json outputs/gpu.json
    .venv/bin/python benchmarks/gpu.py --json outputs/gpu.json --parts equality speedup
    .venv/bin/python benchmarks/gpu.py --json outputs/smoke.json --smoke     # two layers on a CPU, a minute

Models have the shapes of Lumina-mGPT 7B, Emu3 8B and Janus-Pro 7B and random weights in bfloat16, drawn on
the device. A part that is done is written at once. Parts that the file holds for the same card and versions
are left as they are, unless `--parts` names them. A part that fails is written as an error, the others go on,
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script

from benchmarks.gpu_cells import Bench
from benchmarks.gpu_parts import PARTS, first_image


def machine(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Card, driver and versions that numbers belong to."""
    name, driver = platform.processor() or platform.machine(), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
    return {
        "card": name,
        "driver": driver,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "smoke": smoke,
    }


def read(path: Path, where: dict[str, Any]) -> dict[str, Any]:
    """Parts that a file holds for this machine and that did not fail."""
    if not path.is_file():
        return {}
    parts = json.loads(path.read_text())["parts"]
    return {
        name: entry for name, entry in parts.items() if entry["machine"] == where and "error" not in entry
    }


def measure(
    path: Path,
    parts: Sequence[str] | None,
    smoke: bool,
    device: torch.device,
    table: Mapping[str, Callable[[Bench], Any]] = PARTS,
) -> bool:
    """Runs the parts that are missing or named; returns whether all went well.

    Args:
        path: file of the results.
        parts: names of the parts; None = those that the file lacks.
        smoke: two layers and tiny sizes.
        device: device of the models.
        table: all parts, by name.
    """
    where = machine(device, smoke)
    held = read(path, where)
    bench = Bench(device, smoke, {name: entry["found"] for name, entry in held.items()})
    well = True
    for name in table if parts is None else [part for part in table if part in parts]:
        if parts is None and name in held:
            print(f"{name}: already measured here", flush=True)
            continue
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        entry: dict[str, Any] = {"machine": where}
        try:
            entry["found"] = bench.found[name] = table[name](bench)
        except Exception as error:  # the others go on
            entry["error"], well = f"{type(error).__name__}: {error}", False
            bench.drop()
        entry["seconds"] = time.perf_counter() - began
        held[name] = entry
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"parts": held}, indent=1))
        outcome = json.dumps(entry.get("found", entry.get("error")))
        print(f"{name}: {entry['seconds']:.1f} s: {outcome}", flush=True)
    return well


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--json", type=Path, help="file of the results; parts that it holds are not run again"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="these, even if the file holds them")
    parser.add_argument("--smoke", action="store_true", help="two layers and tiny sizes, on a CPU")
    parser.add_argument("--first-image", metavar="DEVICE", help="draw two images and print their seconds")
    options = parser.parse_args()
    if options.first_image:
        print(json.dumps(first_image(Bench(torch.device(options.first_image), options.smoke))))
        return
    if options.json is None:
        parser.error("--json PATH: say where the results go")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --smoke runs every part on a CPU with tiny sizes")
    device = torch.device("cpu" if options.smoke else "cuda")
    sys.exit(0 if measure(options.json, options.parts, options.smoke, device) else 1)


if __name__ == "__main__":
    main()
