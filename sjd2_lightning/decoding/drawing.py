"""Images that are drawn together: their method, prompts, slots and cache, put together and taken apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Context, Shape
from sjd2_lightning.decoding.engine import Engine, Graphs, Progress
from sjd2_lightning.decoding.law import without_law
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.output import DecodeOutput
from sjd2_lightning.fixed_point import DecodeStats
from sjd2_lightning.models.backbone import Backbone, ImageLayout, Trunk
from sjd2_lightning.models.kv_cache import KVCache

LEAVE_SHARE = 0.25  # finished rows leave the batch once they are this share of it: leaving copies the cache
_MEMORY = Path("/proc/meminfo")  # of Linux; elsewhere memory is taken for large enough
_SIDE = 32  # side columns of methods of one shape come in multiples of this; nobody sees those that are spare
_LAWS_AT_PEAK = 12  # numbers of each code and slot of the window that a pass holds, see test_state_size.py


class Batch:
    """A batch of images while they are drawn.

    Args:
        backbone: the model.
        trunk: what runs its trunk.
        config: the method.
        engine: how passes are run.
        token_ids: ids in front of the first slots, see `prompt_token_ids`.
        seeds: seeds of the images.
        layouts: layouts of the images, one a row.
        kept: an earlier batch of this method and these sizes, whose buffers and graphs are used again.

    Raises:
        DoesNotFitError: if the batch does not fit the memory of the device.
    """

    def __init__(
        self,
        backbone: Backbone,
        trunk: Trunk,
        config: DecodingConfig,
        engine: Engine,
        token_ids: Sequence[Sequence[int]],
        seeds: Sequence[int],
        layouts: Sequence[ImageLayout],
        kept: Batch | None = None,
    ) -> None:
        self.backbone, self.config, self.engine = backbone, config, engine
        self.method = Method.of(config, backbone)
        self.one_pass = self.method.one_pass
        self.one_pass.check(layouts)
        side = self.method.levels.timestep_tokens()
        if config.window_shape:  # one number of side columns for all methods, those without levels included
            side = F.pad(side, (0, 0, 0, max(1, -(-len(side) // _SIDE)) * _SIDE - len(side)))
        num_prompt, num_slots = sizes(engine, token_ids, layouts, self.one_pass.most_again)[1:]
        max_len = len(side) + num_prompt + num_slots + self.one_pass.num_columns
        if kept is None:
            laws = 4 * _LAWS_AT_PEAK * len(seeds) * config.size * backbone.num_codes
            cache = _new_cache(backbone, len(token_ids), max_len, laws)
        else:
            cache = kept.cache.all_rows()
        self.cache: KVCache = cache
        self.context = Context(backbone, trunk, token_ids, layouts, side, num_prompt, cache, config)
        self.num_slots = num_slots
        # right of the image lies the window of its last slot; a late host starts passes behind the last one
        num_columns = num_slots + max(config.size, engine.lag + 1)
        seeds_there = torch.tensor(list(seeds), device=backbone.device)
        self.state = self.method.begin(seeds_there, layouts, num_columns)
        self.buffers = self.state, self.context.prompts  # of all rows, those that left included
        self.graphs = Graphs() if engine.captured else None
        if kept is not None:
            self._move_into(kept)
        self.layouts = layouts
        self.ends = [layout.num_slots for layout in layouts]
        self.slot_ids = torch.empty_like(self.state.tokens)
        self.committed = torch.empty_like(self.state.committed)
        self.progress, self.num_passes = Progress(engine.lag, len(seeds)), 0

    def _move_into(self, kept: Batch) -> None:
        """Takes the place of an earlier batch: its buffers with the content of this one, and its graphs."""
        state, prompts = kept.buffers
        state.fill(self.state)
        prompts.fill(self.context.prompts)
        self.buffers, self.graphs, self.method = kept.buffers, kept.graphs, kept.method
        self.one_pass, self.state, self.context.prompts = kept.one_pass, state, prompts

    def run(self, iteration: Callable[[Shape], object], shape: Shape) -> None:
        """Runs an iteration of this batch: as it comes, or as a graph."""
        if self.graphs is None:
            iteration(shape)
        else:
            self.graphs.run(len(self.ends), shape, iteration)
        self.num_passes += 1

    def shape(self) -> Shape:
        """Shape of the coming pass, from what the host knows."""
        most, size = self.progress.most(self.config.size), self.one_pass.num_columns
        end = self.engine.key_columns(self.context.first_slot + min(most, self.num_slots) + size)
        if self.config.window_shape:
            end = self.cache.max_len
        static = self.engine.lag > 0 or self.engine.columns > 1 or self.config.window_shape > 0
        again = self.one_pass.most_again if static else max(1, *self.progress.uncached)
        in_prompt = static or min(self.progress.heads) < again
        return Shape(min(end, self.cache.max_len), again, in_prompt)

    def unfinished(self) -> list[int]:
        """Rows whose image has slots left, as far as the host knows."""
        return [row for row, head in enumerate(self.progress.heads) if head < self.ends[row]]

    def drop_finished(self) -> bool:
        """Lets finished rows leave, if they are enough; returns whether any rows are left.

        Raises:
            ValueError: the logits of a row were not finite.
        """
        going = self.unfinished()
        num_rows = len(self.ends)
        stay = self.engine.rows(len(going)) if going else 0
        if going and (self.config.window_shape or num_rows - stay < LEAVE_SHARE * num_rows):
            return True
        self.progress.settle(range(num_rows))
        self._check_laws()
        going = self.unfinished()
        self.slot_ids[self.state.image] = self.state.tokens
        self.committed[self.state.image] = self.state.committed
        if not going:
            return False
        idle = [row for row in range(num_rows) if row not in going]
        rows = sorted(going + idle[: self.engine.rows(len(going)) - len(going)])
        index = torch.tensor(rows, device=self.state.head.device)
        self.context.keep_rows(index)
        self.state = self.state.keep(index)
        self.ends = [self.ends[row] for row in rows]
        self.progress.settle(rows)
        return True

    def _check_laws(self) -> None:
        lawless = self.progress.lawless
        if wrong := [row for row, slot in enumerate(lawless) if slot < self.state.tokens.shape[1]]:
            image, slot = min((int(self.state.image[row]), lawless[row]) for row in wrong)
            raise without_law(
                self.backbone,
                f"at slot {slot} of image {image} of {len(self.layouts)} that {self.config.method} draws in "
                f"{str(self.cache.keys[0].dtype).removeprefix('torch.')}",
            )

    def output(self) -> DecodeOutput:
        """What `decode` returns, once no row is left."""
        passes = self.committed.T.cpu()
        num = int((passes > 0).any(1).sum())
        return DecodeOutput.of(self.slot_ids[:, : self.num_slots], self.layouts, DecodeStats(passes[:num]))


def sizes(
    engine: Engine, token_ids: Sequence[Sequence[int]], layouts: Sequence[ImageLayout], least: int = 1
) -> tuple[int, int, int]:
    """Numbers of rows, of columns of the prompts and of slots: batches of one method agree in shapes by them.

    Args:
        engine: how passes are run.
        token_ids: ids in front of the first slots.
        layouts: layouts of the images.
        least: least number of columns of the prompts.
    """
    longest = max(least, *map(len, token_ids))
    return len(token_ids), engine.prompt_columns(longest), max(layout.num_slots for layout in layouts)


class DoesNotFitError(ValueError):
    """A batch is larger than the memory that is free."""


def _new_cache(backbone: Backbone, rows: int, max_len: int, beside: int) -> KVCache:
    """A cache of `rows` x `max_len` columns; refused if it and `beside` further bytes do not fit."""
    needed = backbone.new_cache(1, 1).num_bytes * rows * max_len + beside
    free = _free_bytes(backbone.device)
    if needed > free:
        raise DoesNotFitError(
            f"decoding {rows} rows of {max_len} columns needs {needed / 2**30:.1f} GiB on {backbone.device}, "
            f"and {free / 2**30:.1f} GiB are free: take fewer prompts at once, a smaller image or a shorter "
            "window"
        )
    cache = backbone.new_cache(rows, max_len)
    if cache.max_len < max_len:
        raise ValueError(
            f"cache too short: prompts, images and window take {max_len} positions, the backbone's "
            f"`new_cache` gave {cache.max_len}"
        )
    return cache


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        lines = _MEMORY.read_text().splitlines() if _MEMORY.exists() else []
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        return found[0] if found else sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
