"""What a pretrained text-to-image model contributes: ids, layout, embeddings, trunk, head, image decoder.

Three kinds of ids: `image_ids` count codes of the image tokenizer, `token_ids` entries of the model's
vocabulary, and `slot_ids` what fills a slot of the image sequence: codes 0..K-1, then the structural tokens
(row ends) from K on. The arithmetic between them lives in the adapters, nowhere else.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sjd2_lightning.masks import Visible
from sjd2_lightning.models.draft_corrector import CORRECTOR_FILE, DraftCorrector
from sjd2_lightning.models.kv_cache import KVCache
from sjd2_lightning.models.noise_gate import NoiseGate


@dataclass(frozen=True)
class ImageLayout:
    """The slots of one image size.

    Attributes:
        height, width: size of the image in codes.
        forced: for each of the N slots -1 where a code is drawn, else the slot id that stands there.
        pixels: (height, width) of the image in pixels.
        axes: on each axis of positions, N distances of the slots from the first position behind the prompt;
            () = one axis, counted on slot by slot.
        grids: (height, width) of each grid of codes, in order, where there are several; the last one is the
            image. Their codes then lie in one row: `height` is 1 and `width` the number of all codes.
    """

    height: int
    width: int
    forced: tuple[int, ...]
    pixels: tuple[int, int]
    axes: tuple[tuple[int, ...], ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the image in codes."""
        return self.grids[-1] if self.grids else (self.height, self.width)

    def distances(self, num: int) -> Tensor:
        """(A, num) distances of slots on each of several axes; right of the image that of the last slot."""
        own = torch.tensor(self.axes)
        return torch.cat([own, own[:, -1:].expand(-1, num)], dim=1)[:, :num]

    @property
    def num_slots(self) -> int:
        return len(self.forced)

    @property
    def code_slots(self) -> Tensor:
        """(height * width,) indices of the slots that hold codes, in raster order."""
        return (torch.tensor(self.forced) < 0).nonzero().squeeze(1)

    def image_ids(self, slot_ids: Tensor) -> Tensor:
        """(B, height, width) codes of slot ids (B, N)."""
        return slot_ids[:, self.code_slots.to(slot_ids.device)].view(-1, self.height, self.width)

    def slot_ids(self, image_ids: Tensor) -> Tensor:
        """(B, N) slot ids of codes (B, height, width).

        Raises:
            ValueError: if the codes have another size than this layout.
        """
        if tuple(image_ids.shape[1:]) != (self.height, self.width):
            raise ValueError(
                f"image_ids of size {tuple(image_ids.shape[1:])} do not fit {self.height}x{self.width}"
            )
        slots = torch.tensor(self.forced, device=image_ids.device).repeat(len(image_ids), 1)
        slots[:, self.code_slots.to(image_ids.device)] = image_ids.flatten(1)
        return slots


def by_row(layouts: Sequence[ImageLayout], value: Callable[[ImageLayout], Tensor]) -> Tensor:
    """(B, ...) a value of each row's layout, found once for every layout that differs."""
    kinds = {layout: number for number, layout in enumerate(dict.fromkeys(layouts))}
    which = torch.tensor([kinds[layout] for layout in layouts])
    return torch.stack([value(layout) for layout in kinds])[which]


def position_ids(
    slots: Tensor, lengths: Tensor, distances: Tensor | None = None, from_image: bool = False
) -> Tensor:
    """Position ids (B, L), or (A, B, L) for slots on several axes, of what a trunk is fed.

    Args:
        slots: (B, L) slots; those below 0 are tokens of the prompt, -1 its last.
        lengths: (B,) number of tokens of each row's prompt.
        distances: (B, A, N) of slots, see `ImageLayout.distances`; None counts on.
        from_image: position 0 is that of the first slot, and those of prompts are below 0; False: it is that
            of the prompt's first token.
    """
    counted = slots if from_image else slots + lengths[:, None]
    if distances is None:
        return counted
    num_rows, num_axes, num = distances.shape
    places = slots.clamp(0, num - 1)[:, None].expand(-1, num_axes, -1)
    own = distances.gather(2, places) + (0 if from_image else lengths.view(num_rows, 1, 1))
    return torch.where(slots[:, None] < 0, counted[:, None], own).transpose(0, 1)


def rows_with_newlines(height: int, width: int, newline: int, pixels: tuple[int, int]) -> ImageLayout:
    """Layout of Lumina-mGPT and Emu3: every row of codes but the last ends in a newline token."""
    row = (*[-1] * width, newline)
    return ImageLayout(height, width, (row * height)[:-1], pixels)


class Backbone(nn.Module, ABC):
    """An autoregressive text-to-image model as training and decoding see it.

    Attributes:
        num_codes: K, size of the image vocabulary.
        hidden_size: D, width of an embedding.
        num_positions: positions that the model was made for; without a limit, more than any sequence has.
        from_image: whether positions are counted from the first slot, so that prompts have those below 0.
        takes_visible: whether `forward` takes a `Visible` in the place of a mask.
        shortest_prompt: a prompt that takes as few token ids as any.
        corrector: what corrects its drafts in replay decoding; None where it has none.
        noise_gate: that of its adapter, if it has one that acts on noisy tokens alone.
    """

    num_codes: int
    hidden_size: int
    num_positions: int = sys.maxsize
    from_image: bool = False
    takes_visible: bool = False
    shortest_prompt: str = "a"
    decoder: Any = None  # what decoding keeps of this model; see `decoding.loop.decoder_of`
    corrector: DraftCorrector | None
    noise_gate: NoiseGate | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("corrector", None)

    def take_corrector(self, state: Mapping[str, Tensor]) -> None:
        """Makes room for the corrector that a state of this model holds; a state without one leaves none."""
        weight = state.get("corrector.left.weight")
        self.corrector = None if weight is None else DraftCorrector(weight.shape[1], weight.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "decoder": None}  # of this model alone: copies make their own

    def read_corrector(self, folder: str | Path) -> None:
        """Takes the corrector that a folder holds, if it does; raises ValueError for another model's."""
        if (path := Path(folder) / CORRECTOR_FILE).is_file():
            self.corrector = DraftCorrector.load(path, self.hidden_size).to(self.device)

    def open_gate(self, visible: Visible) -> None:
        """Lets an adapter of noise alone act on the noisy tokens of the next pass."""
        if self.noise_gate is not None:
            self.noise_gate.open_for(visible.noisy)

    def gated(self, noisy: Tensor | None) -> AbstractContextManager[None]:
        """The same for the passes inside the block, whose noisy tokens are (B, L); None = none is."""
        return nullcontext() if self.noise_gate is None else self.noise_gate.opened_for(noisy)

    def write_corrector(self, folder: str | Path) -> None:
        """Writes the corrector into a folder; one of other weights that lies there goes."""
        path = Path(folder) / CORRECTOR_FILE
        path.unlink(missing_ok=True)
        if self.corrector is not None:
            self.corrector.save(path)

    @abstractmethod
    def layout(self, height: int, width: int) -> ImageLayout:
        """Slots of an image of (height, width) pixels; raises ValueError for a size the model cannot draw."""

    @abstractmethod
    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        """Token ids of everything in front of the first slot; raises ValueError for an empty prompt.

        Needs no weights: see `without_weights`.
        """

    @abstractmethod
    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        """Token ids in front of the first slot on the unconditional side of guidance.

        Args:
            prompt_ids: token ids of the conditional side; some models keep its length.
        """

    @abstractmethod
    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """(..., D) embeddings of token ids."""

    def embed_prompts(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        """(B, P, D) what the trunk is fed in front of the first slot; by default embeddings of the ids.

        Args:
            token_ids: (B, P) aligned at their right ends, see `right_aligned`.
            starts: (B,) column at which each row starts; what lies left of it is not seen.
        """
        return self.embed_tokens(token_ids)

    @abstractmethod
    def slot_table(self) -> Tensor:
        """(K + structural tokens, D): what the trunk is fed for each slot id."""

    @abstractmethod
    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Visible,
        cache: KVCache | None = None,
        noisy: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D) of embeddings (B, L, D) under a boolean mask (B, 1, L, S).

        Without a cache S is L, and no token sees one behind it; where `takes_visible`, what such columns see
        may come in place of the mask.
        Position ids are (B, L), or (A, B, L) where layouts have several axes; see `position_ids`.
        An adapter of noise alone acts on the tokens that are `noisy`, (B, L) bool; None = on none.
        """

    @abstractmethod
    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the K codes, (..., K), of hidden states (..., D)."""

    def image_head(self) -> Tensor | None:
        """(K, D) of which `image_logits` are the products with hidden states; None where it is more."""
        return None

    @abstractmethod
    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for `batch` rows of at most `max_len` columns."""

    @abstractmethod
    def decode_images(self, image_ids: Tensor, layout: ImageLayout | None = None) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] of codes (B, H, W).

        Args:
            image_ids: codes.
            layout: layout of the images; needed where their codes lie in one row, see `ImageLayout.grids`.
        """

    @abstractmethod
    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes weights and everything needed to load them again into a local folder."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def excess(self, ids: Sequence[int], layout: ImageLayout) -> str:
        """Why token ids in front of the first slot are too many; "" if they and the image fit the model."""
        if len(ids) + layout.num_slots <= self.num_positions:
            return ""
        return (
            f"{len(ids):,} tokens with its template, and the model has {self.num_positions:,} positions, "
            f"{layout.num_slots:,} of them for the image; shorten it"
        )

    def without_weights(self) -> Backbone:
        """A copy that knows layouts and ids alone, for a process that only counts tokens."""
        light = copy.copy(self)
        light._modules, light._parameters, light._buffers = {}, {}, {}
        return light

    def decoding_trunk(self, compiled: bool, invariant: bool, flex: bool = False) -> Trunk:
        """What runs the trunk while decoding; models whose layers can be called one by one have their own.

        Args:
            compiled: whether through `torch.compile`.
            invariant: whether by batch-invariant layers, which are not compiled.
            flex: whether compiled layers attend by FlexAttention; models without such layers do not.

        Raises:
            ValueError: if the model cannot be run invariantly.
        """
        if invariant:
            raise ValueError(
                f"decoding.invariant=true: {type(self).__name__} has no layers that could be replaced by "
                "invariant ones; set it to false"
            )
        return Trunk(self, compiled)


def right_aligned(rows: Sequence[Sequence[int]], pad_to: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged id lists as one block, padded on the left with id 0.

    Returns:
        ids (B, P) int64, and the column (B,) at which each row starts.
    """
    width = max(pad_to, *(len(row) for row in rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([width - len(row) for row in rows])


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every submodule gets its own mode back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class Trunk:
    """The backbone's own forward, with a dense mask, and its head.

    Args:
        backbone: the model.
        compiled: whether through `torch.compile`.
    """

    def __init__(self, backbone: Backbone, compiled: bool) -> None:
        self.backbone = backbone
        self.weights: list[dict[str, Tensor]] = []  # of layers, where they are held for a batch
        self.forward = torch.compile(backbone, dynamic=True) if compiled else backbone

    def run(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> Tensor:
        """Hidden states (B, L, D) of embeddings (B, L, D) at positions (B, L)."""
        return self.forward(embeddings, positions, visible.dense(cache.num_visible), cache, visible.noisy)

    def prefill(self, embeddings: Tensor, positions: Tensor, visible: Visible, cache: KVCache) -> None:
        """The same for prompts, whose lengths differ from batch to batch: never compiled."""
        self.backbone(embeddings, positions, visible.dense(cache.num_visible), cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., K) of hidden states (..., D)."""
        return self.backbone.image_logits(hidden)
