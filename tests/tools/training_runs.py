"""Small training runs that record what they did, to be stopped, continued and compared to the last bit.

As a program (`python -m tests.tools.training_runs FOLDER JSON`) it is one rank of such runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from sjd2_lightning.cli.train import train
from sjd2_lightning.config.reading import conf_dir
from sjd2_lightning.models.small import build_tiny
from sjd2_lightning.training import module
from sjd2_lightning.training.module import SJD2Module
from tests.tools.source import REPO
from tests.tools.tiny_backbones import tiny_image_tokenizer

NUM_PICTURES = 24
SETTINGS = (
    *("metrics=none", "logger=none", "callbacks=no_sampling", "callbacks.progress_bar=null", "trainer=cpu"),
    *("data.views=1", f"data.max_images={NUM_PICTURES}", "data.batch_size=2", "data.val_batch_size=12"),
    *("validate_first=false", "optimizer.warmup_steps=2", "trainer.limit_val_batches=1"),
)
# What every scenario of the matrix has: accumulation, averaged weights, a checkpoint at every step.
MATRIX = (
    *("trainer.accumulate_grad_batches=2", "trainer.max_steps=8", "trainer.val_check_interval=4"),
    *("callbacks.ema_decay=0.9", "callbacks.checkpoint.every_n_train_steps=1"),
    "callbacks.checkpoint.save_top_k=-1",
)
STOPS = {"auto": (1, 6), "last": (5, 6)}  # steps of 6 an epoch, in which each way is told to end


def make_folder(folder: Path) -> Path:
    """A backbone of random weights; the shards are made beside it by the first run."""
    tiny_image_tokenizer(num_codes=16, patch=8).save(folder / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    captions = ["red heart", "blue circle", "cat face"]
    build_tiny(captions, folder / "tokenizer", text_vocab_size=512, **sizes).save(folder / "model")
    return folder


def places(folder: Path, run_dir: Path) -> list[str]:
    """The overrides that name what `make_folder` made."""
    return [f"model.path={folder / 'model'}", f"data.data_dir={folder / 'data'}", f"run_dir={run_dir}"]


def digest(*parts: Any) -> str:
    """A short sum of tensors and plain values."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return found.hexdigest()[:16]


@contextmanager
def recording(stop_at: int | None = None, number: int = signal.SIGTERM) -> Iterator[list[dict[str, Any]]]:
    """Notes data, noise, loss and random state of every batch; at a step the process is told to end."""
    seen: list[dict[str, Any]] = []
    step, noisy = SJD2Module.training_step, module.noisy_codes
    in_training = False

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal in_training
        seen.append({"step": self.global_step, "keys": list(batch.keys), "noise": None})
        if self.global_step == stop_at:
            os.kill(os.getpid(), number)
        before = digest(torch.rand(2))  # uses the global generator, as dropout would
        in_training = True
        loss = step(self, batch, batch_idx)
        in_training = False
        seen[-1] |= {"loss": float(loss.detach()).hex(), "random": before}
        return loss

    def noise_of(*arguments: Any) -> Any:
        found = noisy(*arguments)
        if in_training:
            seen[-1]["noise"] = digest(found.levels, found.eps)
        return found

    SJD2Module.training_step, module.noisy_codes = training_step, noise_of  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SJD2Module.training_step, module.noisy_codes = step, noisy  # type: ignore[method-assign]


def run(overrides: Sequence[str], stop_at: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """One start of train.py in this process: what it did, and its exit status."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [*SETTINGS, *overrides])
    with recording(stop_at) as seen:
        try:
            train(cfg)
        except SystemExit as end:
            return seen, int(end.code or 0)
    return seen, 0


def scenarios(folder: Path, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The uninterrupted run, and runs that were stopped and continued in each of the three ways."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    common = [*MATRIX, *overrides]
    # makes the shards, and imports what is imported late: some packages draw a random number then
    run([*places(folder, out / "first"), *common, "trainer.max_steps=1"])
    found: dict[str, Any] = {"whole": [run([*places(folder, out / "whole"), *common])]}
    # only the last rank is told to end: the others learn it from that one
    told = rank == int(os.environ.get("WORLD_SIZE_OF_TEST", "1")) - 1
    for way, steps in STOPS.items():
        place = [*places(folder, out / way / "run"), *common]
        stops = [step if told else None for step in steps]
        found[way] = [run(place, stops[0])]
        found[way] += [run([*place, f"ckpt_path={way}"], stop) for stop in (*stops[1:], None)]
    (saved,) = (out / "whole" / "checkpoints").glob("epoch_*-step_4.ckpt")
    found["path"] = [run([*places(folder, out / "path"), *common, f"ckpt_path={saved}"])]
    return found


def on_ranks(world_size: int, program: str, *arguments: str, log_dir: Path, timeout_s: float = 900) -> None:
    """Runs a program of `tests` on several processes, each a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["WORLD_SIZE_OF_TEST"] = str(world_size)
    log_dir.mkdir(parents=True, exist_ok=True)
    logs = [(log_dir / f"rank{rank}.log").open("w") for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", program, *arguments],
            cwd=REPO,
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()
    assert codes == [0] * world_size, (log_dir / "rank0.log").read_text()[-3000:]


def scenarios_on_ranks(
    world_size: int, folder: Path, out: Path, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """What `scenarios` finds on each of several ranks."""
    given = (str(folder), str(out), json.dumps(list(overrides)))
    on_ranks(world_size, "tests.tools.training_runs", *given, log_dir=out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what differs between two nested values, in any bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{name}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            line
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for line in differences(x, y, f"{name}.{i}")
        ]
    return [] if a == b else [f"{name}: {a!r} {b!r}"[:200]]


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint without what names folders, and Lightning's counts of validations and epochs begun.

    Those begin anew at an end of an epoch, and decide nothing.
    """
    found = torch.load(path, weights_only=True)
    fit = found["loops"] = found["loops"]["fit_loop"]
    del fit["epoch_loop.val_loop.batch_progress"], fit["epoch_progress"]
    found["callbacks"] = {k: v for k, v in found["callbacks"].items() if not k.startswith("Retention")}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, target, given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    result = scenarios(source, target, given)
    (target / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(result))
