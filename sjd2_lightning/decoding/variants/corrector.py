"""Drafts corrected by a small network, which reads the hidden state behind a slot's law (ours).

A pass read the law of a slot behind what its left neighbour was then. By the time the next draft is made, the
neighbour has changed, and nine of ten wrong drafts are wrong for that alone. The network says what the new
neighbour makes of the law. Replay only: there it does not matter what a draft is made of.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sjd2_lightning.decoding.config import Correction
from sjd2_lightning.decoding.law import guided
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict, known_codes


class DraftCorrector(nn.Module):
    """What a new left neighbour makes of a law: the logit of code k changes by `forward(...)` @ e_k.

    It has no numbers for single codes: those enter and leave by their embeddings, so that its size does not
    depend on the vocabulary. A new one changes nothing.

    Args:
        hidden_size: D, width of hidden states and embeddings.
        width: number of units.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.state = nn.Linear(hidden_size, width)
        self.old = nn.Linear(hidden_size, width, bias=False)
        self.new = nn.Linear(hidden_size, width, bias=False)
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def known(self, hidden: Float[Tensor, "*slots D"], old: Float[Tensor, "*slots U"]) -> Tensor:
        """(..., U) what a slot is known by, whatever its neighbour becomes.

        Args:
            hidden: (..., D) hidden states that laws were read from.
            old: (..., U) the part `old` of what the left neighbours were then.
        """
        return self.state(F.rms_norm(hidden.float(), (self.hidden_size,))) + old

    def forward(self, mixed: Float[Tensor, "*slots U"]) -> Float[Tensor, "*slots D"]:
        """(..., D) the change of a law, from units (..., U)."""
        return self.out(mixed)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, in half precision."""
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path, hidden_size: int) -> DraftCorrector:
        """Reads a file of `save`.

        Raises:
            ValueError: the file is something else, or of a model of another width.
        """
        try:
            state = {name: value.float() for name, value in load_file(path).items()}
            width, theirs = state["new.weight"].shape
            found = cls(theirs, width)
            found.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"corrector.weights: {path} is no corrector of drafts: {error}") from None
        if theirs != hidden_size:
            raise ValueError(
                f"corrector.weights: {path} is of a model of width {theirs}, this one has {hidden_size}; "
                "train one on this model's own decodings by `sjd2 corrector`"
            )
        return found.requires_grad_(False)


def code_rows(table: Float[Tensor, "rows D"], num_codes: int) -> Float[Tensor, "codes D"]:
    """(K + 1, D) embeddings of codes, each of mean square 1; row K, of what is not known, is zero."""
    return F.pad(F.rms_norm(table[:num_codes].float(), (table.shape[1],)), (0, 0, 0, 1))


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int, hidden_size: int, device: torch.device) -> DraftCorrector:
    return DraftCorrector.load(path, hidden_size).to(device)


class Corrected:
    """Corrects the drafts of a window.

    Args:
        config: the network and how it is used.
        temperature: that of the law.
        table: (K + structural, D) embeddings by slot id, for their device.
        num_codes: K.
    """

    def __init__(self, config: Correction, temperature: float, table: Tensor, num_codes: int) -> None:
        self.config, self.num_codes = config, num_codes
        path = config.weights
        assert path is not None
        self.network = _loaded(path, Path(path).stat().st_mtime_ns, table.shape[1], table.device)
        rows = code_rows(table, num_codes)
        self.old, self.new = self.network.old(rows), self.network.new(rows)  # (K + 1, U)
        # the change of code k is e_k . W u: the codes' part of it, (K, U), is made once
        self.effect = rows[:-1] @ self.network.out.weight / temperature

    def __call__(
        self, slots: Slots, verdict: Verdict, scores: Scores, settled: Bool[Tensor, "B W"]
    ) -> Tensor:
        """The next drafts (B, W), as slot ids; see `method.Redraft`."""
        read, tokens = scores.read, verdict.tokens
        assert slots.gumbel is not None
        assert read is not None
        moves = (slots.is_code & ~settled)[:, 1:]
        # 1. the best codes of each slot under its own noise, and what the slot is known by
        num = min(self.config.candidates, self.num_codes)
        best, codes = (scores.log + slots.gumbel)[:, 1:].topk(num, dim=-1, sorted=False)  # (B, W - 1, n)
        effect = F.embedding(codes, self.effect)  # (B, W - 1, n, U)
        fed = known_codes(slots.tokens, slots.levels, self.num_codes)[:, :-1]
        sides = len(read.hidden) // len(fed)
        old = F.embedding(fed, self.old).repeat(sides, 1, 1)
        known = self.network.known(read.hidden[:, 1:], old)  # (C * B, W - 1, U)
        scale = read.scale[:, 1:] if isinstance(read.scale, Tensor) else read.scale
        for _ in range(self.config.rounds):
            # 2. the neighbour's new token changes the law, on both sides of guidance
            now = F.embedding(tokens[:, :-1].clamp_max(self.num_codes), self.new).repeat(sides, 1, 1)
            units = guided(F.gelu(known + now), scale)
            change = torch.einsum("bwnu,bwu->bwn", effect, units)  # on a CPU six times faster than `@`
            # 3. and with it which of the codes is the best
            chosen = (best + change).argmax(-1, keepdim=True)
            drafts = codes.gather(-1, chosen).squeeze(-1).where(moves, tokens[:, 1:])
            tokens = torch.cat([tokens[:, :1], drafts], dim=1)
        return tokens
