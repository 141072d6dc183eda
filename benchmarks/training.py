"""What a training step costs: against plain fine-tuning, by batch and length, in memory, and to feed.

    .venv/bin/python benchmarks/training.py --json outputs/training.json
    .venv/bin/python benchmarks/training.py --gpu --json outputs/gpu.json   # the shapes of releases
    .venv/bin/python benchmarks/training.py --gpu --smoke --json outputs/smoke.json   # tiny, on a CPU

Overhead: our step (noise, mask, timestep tokens) against a plain next-token step of the same trunk by
transformers, with the whole head at every position as its causal models do, and with the head on the image
codes alone as ours does. All have the same prompts, pictures and optimizer. Steps are interleaved; overhead
is the median of the ratios of neighbouring steps. Time is processor time of one thread, in which other load
on the machine does not count; on a GPU it is wall clock.

Memory: the most that the process holds during a step beyond what it held before, with and without activation
checkpointing. Loader: samples a second of processor time against reading the same tar files with `tarfile`,
and against what the model consumes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.cli.prepare import prepare_emoji
from sjd2_lightning.data.index import ShardIndex
from sjd2_lightning.data.loader import CodeDataset, CodeLoader
from sjd2_lightning.models.backbone import ImageLayout, right_aligned
from sjd2_lightning.models.chameleon import ChameleonBackbone, load_chameleon
from sjd2_lightning.training.module import SJD2Module, TrainingNoise
from sjd2_lightning.training.optimizer import OptimizerConfig, build_optimizer

CAPTIONS = ("red apple", "smiling face with open mouth", "flag", "person in lotus position: medium skin tone")
GROWTH = {"batch": (2, 4, 8, 16), "pixels": (32, 64, 96)}
BASE = {"batch": 4, "pixels": 64}
PARTS = ("overhead", "growth", "feeding")
GPU_PARTS = ("lora", "int8", "full", "fp8", "long")


class Batch(NamedTuple):
    """What training reads of a batch."""

    captions: list[str]
    image_ids: Tensor


def batch_of(backbone: ChameleonBackbone, size: int, layout: ImageLayout, device: str) -> Batch:
    """Random codes: what they are costs nothing."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(backbone.num_codes, (size, layout.height, layout.width), generator=rng)
    return Batch([CAPTIONS[row % len(CAPTIONS)] for row in range(size)], codes.to(device))


def our_step(module: SJD2Module, batch: Batch) -> Callable[[int], Tensor]:
    """The loss of our training step; the noise differs by its number."""
    return lambda number: module.training_step(batch, number)


def plain_step(module: SJD2Module, batch: Batch, whole_head: bool) -> Callable[[int], Tensor]:
    """The loss of plain next-token training by transformers: token ids, padding mask, head, cross-entropy."""
    backbone: Any = module.backbone
    layout, model = module.image_layout, backbone.model

    def loss(number: int) -> Tensor:
        prompts, starts = right_aligned([backbone.prompt_ids(text, layout) for text in batch.captions])
        slots = backbone.slot_token_ids[layout.slot_ids(batch.image_ids)]
        ids = torch.cat([prompts.to(slots.device), slots], dim=1)[:, :-1]
        columns = torch.arange(ids.shape[1], device=ids.device)
        seen = (columns >= starts.to(ids.device)[:, None]).long()
        hidden = model.model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        if not whole_head:
            places = layout.code_slots.to(hidden.device) + prompts.shape[1] - 1
            logits = backbone.image_logits(hidden[:, places])
            return F.cross_entropy(logits.flatten(0, 1).float(), batch.image_ids.flatten())
        targets = torch.cat([torch.full_like(prompts, -100)[:, 1:].to(slots.device), slots], dim=1)
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), targets.flatten())

    return loss


class Trainee:
    """A trunk with its optimizer, and steps to take."""

    def __init__(
        self, folder: str, pixels: int, batch: int, device: str, noise: bool, checkpointing: bool = False
    ):
        backbone = load_chameleon(folder).to(device)
        if checkpointing:
            backbone.checkpoint_activations()
        config = OptimizerConfig()
        self.module = SJD2Module(backbone, TrainingNoise(enabled=noise), config, image_size=(pixels, pixels))
        self.module.log = lambda *_, **__: None  # type: ignore[method-assign]  there is no trainer
        self.module.train()
        self.optimizer = build_optimizer(self.module.named_parameters(), config)
        self.batch = batch_of(backbone, batch, self.module.image_layout, device)

    def step(self, loss: Callable[[int], Tensor], number: int) -> None:
        """Forward, backward, clip, optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        loss(number).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()

    def seconds(self, loss: Callable[[int], Tensor], number: int) -> float:
        """Of one step."""
        on_gpu = self.batch.image_ids.is_cuda
        clock = time.perf_counter if on_gpu else time.process_time
        start = clock()
        self.step(loss, number)
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start

    @property
    def num_tokens(self) -> int:
        """Image codes of a batch."""
        return self.batch.image_ids.numel()


def overhead(folder: str, device: str, repeats: int, batch: int) -> dict[str, Any]:
    """Seconds and tokens a second of each kind of step, and ours over the plain ones."""
    ours, off = (Trainee(folder, 64, batch, device, noise) for noise in (True, False))
    kinds = {
        "ours": (ours, our_step(ours.module, ours.batch)),
        "ours, noise off": (off, our_step(off.module, off.batch)),
        "plain": (off, plain_step(off.module, off.batch, whole_head=True)),
        "plain, head on codes": (off, plain_step(off.module, off.batch, whole_head=False)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(-1, repeats):
        for name, (trainee, loss) in kinds.items():
            taken = trainee.seconds(loss, max(number, 0))
            if number >= 0:  # the first round warms up
                seconds[name].append(taken)
    found: dict[str, Any] = {
        name: {
            "seconds": statistics.median(taken),
            "tokens_per_s": ours.num_tokens / statistics.median(taken),
        }
        for name, taken in seconds.items()
    }
    for base in ("plain", "plain, head on codes"):
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[base], strict=True)]
        found["ours"][f"over {base}"] = statistics.median(ratios) - 1
    return found


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """The most that is held during a call beyond what was held before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def growth(folder: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Time and memory of our step by batch and by length, without and with activation checkpointing."""
    return [
        _apart(_grown, folder, device, repeats, axis, value, checkpointing)
        for axis, values in GROWTH.items()
        for value in values
        for checkpointing in (False, True)
    ]


def _apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls in a process of its own: what others have held and freed does not count there."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(call, arguments)


def _grown(
    folder: str, device: str, repeats: int, axis: str, value: int, checkpointing: bool
) -> dict[str, Any]:
    if device == "cpu":
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: tensors that are freed leave the process
    sizes = {**BASE, axis: value}
    trainee = Trainee(folder, sizes["pixels"], sizes["batch"], device, True, checkpointing)
    loss = our_step(trainee.module, trainee.batch)
    trainee.step(loss, 0)  # gradients and the optimizer's states are there from now on
    trainee.optimizer.zero_grad(set_to_none=True)
    peak = peak_bytes(lambda: trainee.step(loss, 0), device)
    taken = min(trainee.seconds(loss, number) for number in range(repeats))
    found = {"axis": axis, **sizes, "activation_checkpointing": checkpointing, "seconds": taken}
    return found | {"tokens_per_s": trainee.num_tokens / taken, "peak_mib": peak / 2**20}


def feeding(folder: str, num_images: int) -> dict[str, float]:
    """Samples a second of our loader and of reading the same files with `tarfile`."""
    with tempfile.TemporaryDirectory() as place:
        prepare_emoji(Path(place), load_chameleon(folder).image_tokenizer, 1, size=64, max_images=num_images)
        index = ShardIndex.load(Path(place) / "codes" / "train")

        def raw() -> int:
            count = 0
            for shard in sorted(index.folder.glob("*.tar")):
                with tarfile.open(shard) as archive:
                    count += sum(bool(archive.extractfile(member).read()) for member in archive)  # type: ignore[union-attr]
            return count // 3  # codes, caption and facts of each

        def ours() -> int:
            loader = CodeLoader(CodeDataset(index, batch_size=16, train=True))
            return sum(len(batch.captions) for batch in islice(loader, len(loader)))

        return {"raw tar": _rate(raw), "loader": _rate(ours)}


def _rate(call: Callable[[], int], laps: int = 3) -> float:
    found = []
    for _ in range(laps):
        start = time.process_time()
        found.append(call() / (time.process_time() - start))
    return max(found)


def show(found: dict[str, Any]) -> None:
    """Prints what was found."""
    console = Console()
    table = Table("step", "seconds", "tokens/s", "over plain", "over plain, head on codes")
    for name, row in found.get("overhead", {}).items():
        over = [f"{100 * row[key]:+.1f} %" if key in row else "" for key in row if key.startswith("over")]
        table.add_row(name, f"{row['seconds']:.3f}", f"{row['tokens_per_s']:.0f}", *over)
    console.print(table)
    table = Table("batch", "pixels", "activation checkpointing", "seconds", "tokens/s", "peak MiB")
    for row in found.get("growth", ()):
        sizes = (str(row["batch"]), str(row["pixels"]), "on" if row["activation_checkpointing"] else "off")
        rates = (f"{row['seconds']:.3f}", f"{row['tokens_per_s']:.0f}", f"{row['peak_mib']:.0f}")
        table.add_row(*sizes, *rates)
    console.print(table)
    console.print({name: round(rate) for name, rate in found.get("samples_per_s", {}).items()})


def on_gpu(parser: argparse.ArgumentParser, given: argparse.Namespace) -> NoReturn:
    """Measures the shapes of releases; ends the process."""
    sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script
    from benchmarks import gpu, training_gpu

    if given.json is None:
        parser.error("--json PATH: say where the results go")
    if not given.smoke and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --smoke runs every part on a CPU with tiny sizes")
    device = torch.device("cpu" if given.smoke else "cuda")
    sys.exit(0 if gpu.measure(given.json, given.parts, given.smoke, device, training_gpu.PARTS) else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--model", default="weights/tiny", help="a backbone folder of the chameleon family")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, *GPU_PARTS), help="these; all by default")
    parser.add_argument("--gpu", action="store_true", help="an adapter at 7 B, all weights at 1 B, on CUDA")
    parser.add_argument("--smoke", action="store_true", help="with --gpu: two layers, tiny sizes, on a CPU")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step, of the overhead")
    parser.add_argument("--repeats", type=int, default=8, help="steps of each kind")
    parser.add_argument("--num-images", type=int, default=256, help="pictures to feed")
    given = parser.parse_args(arguments)
    known = GPU_PARTS if given.gpu else PARTS
    if given.parts and not set(given.parts) <= set(known):
        parser.error(f"--parts: with{'' if given.gpu else 'out'} --gpu these are {', '.join(known)}")
    if given.gpu:
        on_gpu(parser, given)
    given.parts = given.parts or PARTS
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if "growth" in given.parts:  # first: a process that has trained is no place to fork from
        found["growth"] = growth(given.model, given.device, max(1, given.repeats // 4))
    if "overhead" in given.parts:
        found["overhead"] = overhead(given.model, given.device, given.repeats, given.batch)
    if "feeding" in given.parts:
        found["samples_per_s"] = feeding(given.model, given.num_images)
    if {"overhead", "feeding"} <= set(given.parts):
        codes = 256  # of a picture of 64 x 64 pixels
        found["samples_per_s"]["model"] = found["overhead"]["ours"]["tokens_per_s"] / codes
    show(found)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
