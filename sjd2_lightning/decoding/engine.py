"""How the passes of a batch are run, as they come or as captured CUDA graphs, and what the host knows ."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Shape

_COLUMNS = 256  # a captured pass reads keys of a multiple of so many columns: each multiple is one more graph
_LAG = 2  # passes that the host is behind a GPU, so that it never waits for the pass it has just started


class Engine(NamedTuple):
    """How passes are run.

    Attributes:
        compiled: whether the layers of the trunk are compiled.
        invariant: whether they compute as `models.invariant` does; such layers are never compiled.
        captured: whether iterations are captured as CUDA graphs.
        lag: number of passes after which the host learns how far the rows are; 0 = it waits for each.
        columns: passes read keys of a multiple of so many columns.
        flex: whether compiled layers attend by FlexAttention, without a dense mask.
    """

    compiled: bool
    invariant: bool
    captured: bool
    lag: int
    columns: int
    flex: bool = False

    @classmethod
    def of(cls, config: DecodingConfig, device: torch.device) -> Engine:
        """The engine of a method on a device.

        Raises:
            ValueError: the device cannot run it.
        """
        on_gpu = device.type == "cuda"
        if config.engine == "graphs" and not on_gpu:
            raise ValueError(
                f"decoding.engine=graphs: captures CUDA graphs, and the model is on {device.type}; use auto, "
                "eager or compiled"
            )
        captured = config.engine == "graphs" or (config.engine == "auto" and on_gpu)
        static = captured or config.engine == "compiled"
        compiled = static and not config.invariant
        if config.attention == "flex" and not compiled:
            raise ValueError(
                "decoding.attention=flex: only compiled layers attend by FlexAttention; use auto, or "
                "decoding.engine=compiled with decoding.invariant=false"
            )
        flex = compiled and (config.attention == "flex" or (config.attention == "auto" and on_gpu))
        lag = _LAG if on_gpu else 0
        return cls(compiled, config.invariant, captured, lag, _COLUMNS if static else 1, flex)

    def watched(self) -> Engine:
        """The engine for passes that are looked at one by one: none captured, and the host waits for each."""
        return self._replace(captured=False, lag=0)

    def prompt_columns(self, num: int) -> int:
        """Number of columns of prompts of at most `num` tokens: batches of one number share their shapes."""
        return _multiple(num, 64 if self.columns > 1 else 1)

    def key_columns(self, num: int) -> int:
        """Number of columns that a pass reads keys of where it needs the first `num`."""
        return _multiple(num, self.columns)

    def rows(self, num: int) -> int:
        """Number of rows that a batch of `num` unfinished ones has: some finished ones may stay."""
        if not self.captured:
            return num
        size = 1 << (num - 1).bit_length()  # 1, 2, 3, 4, 6, 8, 12, 16, ...
        return 3 * size // 4 if size >= 4 and num <= 3 * size // 4 else size


def _multiple(num: int, of: int) -> int:
    return -(-num // of) * of


class Progress:
    """How far the rows of a batch are, as the host knows it: `lag` passes late, so that it need not wait.

    Args:
        lag: number of passes that may be on their way while the host looks.
        num_rows: number of rows.
    """

    def __init__(self, lag: int, num_rows: int) -> None:
        self.lag = lag
        self.heads, self.uncached = [0] * num_rows, [0] * num_rows
        self.lawless = [sys.maxsize] * num_rows
        self.coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def started(self, head: Tensor, uncached: Tensor, lawless: Tensor) -> None:
        """Called behind each pass with what the host is to know.

        Args:
            head: (R,) heads.
            uncached: (R,) committed slots that the cache lacks.
            lawless: (R,) first slots without a law.
        """
        facts = torch.stack([head, uncached, lawless])
        event = None
        if facts.is_cuda:
            host = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=True)
            facts, event = host.copy_(facts, non_blocking=True), torch.cuda.Event()
            event.record()
        self.coming.append((facts, event))
        self._read(self.lag)

    def settle(self, rows: Sequence[int]) -> None:
        """Waits for all passes; from now on the rows are these of the present ones."""
        self._read(0)
        self.heads = [self.heads[row] for row in rows]
        self.uncached = [self.uncached[row] for row in rows]
        self.lawless = [self.lawless[row] for row in rows]

    def most(self, size: int) -> int:
        """The furthest head that a row may have: what is on its way commits at most `size` slots a pass."""
        return max(self.heads) + len(self.coming) * size

    def _read(self, num_left: int) -> None:
        while len(self.coming) > num_left:
            values, event = self.coming.popleft()
            if event is not None:
                event.synchronize()
            self.heads, self.uncached, self.lawless = values.tolist()


class Graphs:
    """CUDA graphs of one batch's iterations, one for each number of rows and shape of a pass."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: dict[tuple[int, Shape], torch.cuda.CUDAGraph | None] = {}

    def run(self, num_rows: int, shape: Shape, iteration: Callable[[Shape], object]) -> None:
        """One iteration: as it comes at first, which compiles and warms up what it needs; then as a graph."""
        key = (num_rows, shape)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if key not in self.seen:
                self.seen[key] = None
                iteration(shape)
            else:
                graph = self.seen[key] or self._captured(key, iteration)
                graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _captured(self, key: tuple[int, Shape], iteration: Callable[[Shape], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            iteration(key[1])
        self.seen[key] = graph
        return graph
