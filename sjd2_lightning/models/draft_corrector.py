"""A small network that corrects drafts by their neighbours (ours).

A pass read the law of a slot behind what its neighbours to the left and above were then. By the time the next
draft is made, they have changed, and nine of ten wrong drafts are wrong for the left one alone. The network
says what the new ones make of the law. How decoding uses it is in `decoding.variants.corrector`.
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

CORRECTOR_FILE = "corrector.safetensors"  # in folders of weights and of adapters


class DraftCorrector(nn.Module):
    """What neighbours say of a slot: code c beside it adds a(c) . e_k to the logit of code k.

    A neighbour that changes from c to d therefore adds (a(d) - a(c)) . e_k, and one that stays adds nothing.
    It has no numbers for single codes: those enter and leave by their embeddings, so that its size does not
    depend on the vocabulary. A new one changes nothing.

    Args:
        hidden_size: D, width of embeddings.
        width: number of units U.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.hidden_size, self.width = hidden_size, width
        self.left = nn.Linear(hidden_size, width)
        self.above = nn.Linear(hidden_size, width)
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    @staticmethod
    def numbers(hidden_size: int, width: int) -> int:
        """Parameters of a network of these sizes."""
        return 3 * hidden_size * width + 2 * width

    def said(self, rows: Float[Tensor, "codes D"]) -> tuple[Tensor, Tensor]:
        """What each code says to the left of a slot and above it, (K + 1, U) each; `rows` by `code_rows`."""
        return F.gelu(self.left(rows)), F.gelu(self.above(rows))

    def change(
        self, rows: Float[Tensor, "codes D"], old: Int[Tensor, "n 2"], new: Int[Tensor, "n 2"]
    ) -> Float[Tensor, "n K"]:
        """(n, K) what new neighbours add to the logits of slots.

        Args:
            rows: (K + 1, D) embeddings by `code_rows`.
            old: (n, 2) left neighbours and those above, as the laws were read behind them; K = not known.
            new: (n, 2) what they are now.
        """
        units = [
            F.embedding(new[:, side], said) - F.embedding(old[:, side], said)
            for side, said in enumerate(self.said(rows))
        ]
        return self.out(units[0] + units[1]) @ rows[:-1].T

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, in half precision."""
        state = self.state_dict().items()
        save_file({name: value.detach().cpu().half().contiguous() for name, value in state}, path)

    @classmethod
    def load(cls, path: str | Path, hidden_size: int) -> DraftCorrector:
        """Reads a file of `save`.

        Raises:
            ValueError: the file is something else, or of a model of another width.
        """
        try:
            state = {name: value.float() for name, value in load_file(path).items()}
            width, theirs = state["left.weight"].shape
            found = cls(theirs, width)
            found.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is no corrector of drafts of this version: {error}; take it away, and train one "
                "anew by `sjd2 corrector`"
            ) from None
        if theirs != hidden_size:
            raise ValueError(
                f"the corrector {path} is of a model of width {theirs}, this one has {hidden_size}; train "
                "one for this model by `sjd2 corrector`"
            )
        return found.requires_grad_(False)


def code_rows(table: Float[Tensor, "rows D"], num_codes: int) -> Float[Tensor, "codes D"]:
    """(K + 1, D) embeddings of codes, each of mean square 1; row K, of what is not known, is zero."""
    return F.pad(F.rms_norm(table[:num_codes].float(), (table.shape[1],)), (0, 0, 0, 1))
