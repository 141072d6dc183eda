"""The decoding loop: one for every method of the Jacobi family, autoregression included.

Why a slot may be committed: its law is read at the slot to its left and never depends on its own embedding.
So the head can always be settled, and a run goes on as long as each slot before its end was fed as the clean
embedding of the very token that it is committed as.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.context import Shape, prompt_token_ids
from sjd2_lightning.decoding.drawing import Batch, DoesNotFitError, sizes
from sjd2_lightning.decoding.engine import Engine
from sjd2_lightning.decoding.output import DecodeOutput, Iteration
from sjd2_lightning.decoding.passes import Judged
from sjd2_lightning.decoding.rules import Slots
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import Backbone, ImageLayout, Trunk

Observer = Callable[[Iteration], None]


def iterate(batch: Batch, shape: Shape, observer: Observer | None = None) -> None:
    """One iteration: tensors of fixed shapes on the device, changed in place; the host learns nothing.

    Args:
        batch: the batch, whose state it moves on.
        shape: shape of the pass.
        observer: called with what the pass showed.
    """
    state, method = batch.state, batch.method
    window = Window(method.source, state)
    slots = window.slots()
    # 1. one forward pass over the window, and a verdict on every slot, as if all slots to its left stood
    this = method.one_pass(batch.context, window, slots, shape)
    window.note_lawless(slots, this.scores)  # the host looks when images are finished
    # 2. the longest run that stands is committed, and the slot behind it, judged on its true prefix too
    committed = (this.run + 1).minimum(state.end - state.head)
    if observer is not None:
        observer(_seen(batch, slots, committed, this))
    # 3. every other slot gets a better draft and is one level cleaner
    settled = method.source.span(0, window.size) <= this.run[:, None]
    drafts = method.redraft(slots, this.verdict, this.scores, settled)
    window.renew(slots, drafts, this.scores)
    # 4. the windows move on
    window.advance(committed, this.cached, this.verdict, this.scores)
    for event in method.on_entry:
        event.entered(window, committed, this.scores)


def start_iteration(batch: Batch, observer: Observer | None = None) -> None:
    """Starts one iteration of a batch, as its engine says; the host learns later how far the rows are."""
    batch.run(partial(iterate, batch, observer=observer), batch.shape())
    batch.progress.started(batch.state.head, batch.state.uncached, batch.state.lawless)


class Decoder:
    """Draws images with one backbone; what is dear to make lives as long as it does.

    Compiled layers serve all batches. A batch whose iterations were captured lends its buffers and graphs to
    the next one of the same method and sizes, as long as the weights are the same.

    Args:
        backbone: the model, in eval mode.
        num_kept: number of captured batches that are kept.
    """

    def __init__(self, backbone: Backbone, num_kept: int = 4) -> None:
        self.backbone, self.num_kept = backbone, num_kept
        self.trunks: dict[object, Trunk] = {}
        self.kept: dict[object, Batch] = {}
        self.version: object = None

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: DecodingConfig,
        layout: ImageLayout | Sequence[ImageLayout],
        observer: Observer | None = None,
    ) -> DecodeOutput:
        """Draws one image a prompt; see `decode`."""
        layouts = _checked(prompts, seeds, config, layout)
        engine = Engine.of(config, self.backbone.device)
        if observer is not None:
            engine = engine.watched()
        batch = self.begin(prompts, seeds, config, layouts, engine)
        while batch.drop_finished():
            start_iteration(batch, observer)
        return batch.output()

    def begin(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: DecodingConfig,
        layouts: Sequence[ImageLayout],
        engine: Engine,
    ) -> Batch:
        """A batch in front of its first slot; arguments of `decode`, with one layout a prompt."""
        ids = prompt_token_ids(self.backbone, prompts, layouts, config.sampling.guidance_scale)
        names = tuple(name for name, _ in self.backbone.named_parameters())  # an adapter adds some
        way = (engine.compiled, engine.invariant, engine.flex)
        if (way, names) not in self.trunks:
            self.trunks[way, names] = self.backbone.decoding_trunk(*way)
        trunk = self.trunks[way, names]
        if not engine.captured:
            return Batch(self.backbone, trunk, config, engine, ids, seeds, layouts)
        version = _version(self.backbone)
        if version != self.version:  # tables and graphs of other weights
            self.release()
            self.version = version
        kind = (config, sizes(engine, ids, layouts))
        kept = self.kept.pop(kind, None)
        if kept is None and len(self.kept) >= self.num_kept:
            del self.kept[next(iter(self.kept))]
        try:
            batch = Batch(self.backbone, trunk, config, engine, ids, seeds, layouts, kept)
        except DoesNotFitError:
            if not self.kept:
                raise
            self.release()
            batch = Batch(self.backbone, trunk, config, engine, ids, seeds, layouts)
        self.kept[kind] = batch
        return batch

    def release(self) -> None:
        """Gives back the memory of captured batches and lets weights go; what was compiled stays."""
        self.kept.clear()
        for trunk in self.trunks.values():
            trunk.weights.clear()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()


def decode(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout | Sequence[ImageLayout],
    observer: Observer | None = None,
) -> DecodeOutput:
    """Draws one image a prompt (paper, section on decoding; replay mode ours).

    Rows advance independently, and a prompt's tokens depend on its seed and size alone, not on its batch.
    The backbone keeps the `Decoder` that draws, so that the next call finds what this one compiled.

    Args:
        backbone: the model, in eval mode.
        prompts: B texts.
        seeds: B integers.
        config: the method.
        layout: layout of the images, from `backbone.layout`: one for all, or one a prompt.
        observer: called after each forward pass.

    Raises:
        ValueError: before the first forward, for bad values, an empty prompt or one that is longer than the
            model's positions, lists of unequal length, an engine that the device cannot run, or a batch that
            does not fit its memory; after the last one of an image, if some logits were not finite.
    """
    return decoder_of(backbone)(prompts, seeds, config, layout, observer)


def decoder_of(backbone: Backbone) -> Decoder:
    """The decoder that a backbone keeps."""
    if backbone.decoder is None:
        backbone.decoder = Decoder(backbone)
    return backbone.decoder


def _version(backbone: Backbone) -> tuple[tuple[int, int], ...]:
    """Where the weights lie and how often they were written to: graphs and tables are made of them."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in backbone.parameters())


def _checked(
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: DecodingConfig,
    layout: ImageLayout | Sequence[ImageLayout],
) -> list[ImageLayout]:
    """The layouts, one a prompt."""
    config.check()
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"need one seed a prompt and at least one; got {len(prompts)} and {len(seeds)}")
    layouts = [layout] * len(prompts) if isinstance(layout, ImageLayout) else list(layout)
    if len(layouts) != len(prompts):
        raise ValueError(f"need one layout for all prompts or one a prompt; got {len(layouts)}")
    return layouts


def _seen(batch: Batch, slots: Slots, committed: Tensor, this: Judged) -> Iteration:
    """What an observer sees; it may keep all of it, so what the next pass writes into is copied."""
    state = batch.state
    return Iteration(
        batch.num_passes,
        state.image.clone(),
        state.head.clone(),
        committed,
        this.verdict.tokens,
        slots.levels,
        this.scores.log,
        slots.gumbel,
        slots.tokens,
        this.scores.read,
    )
