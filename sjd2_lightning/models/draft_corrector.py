"""A small network that corrects drafts by the hidden states behind their laws (ours).

A pass read the law of a slot behind what its left neighbour was then. By the time the next draft is made, the
neighbour has changed, and nine of ten wrong drafts are wrong for that alone. The network says what the new
neighbour makes of the law. How decoding uses it is in `decoding.variants.corrector`.
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

CORRECTOR_FILE = "corrector.safetensors"  # in folders of weights and of adapters


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
        self.hidden_size, self.width = hidden_size, width
        self.state = nn.Linear(hidden_size, width)
        self.old = nn.Linear(hidden_size, width, bias=False)
        self.new = nn.Linear(hidden_size, width, bias=False)
        self.out = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.out.weight)

    @staticmethod
    def numbers(hidden_size: int, width: int) -> int:
        """Parameters of a network of these sizes."""
        return 4 * hidden_size * width + width

    def known(self, hidden: Float[Tensor, "*slots D"], old: Float[Tensor, "... U"]) -> Tensor:
        """(..., U) what a slot is known by, whatever its neighbour becomes.

        Args:
            hidden: (..., D) hidden states that laws were read from.
            old: (..., U) the part `old` of what the left neighbours were then; on all sides the same.
        """
        return self.state(F.rms_norm(hidden.float(), (self.hidden_size,)).to(self.state.weight)) + old

    def forward(self, mixed: Float[Tensor, "*slots U"]) -> Float[Tensor, "*slots D"]:
        """(..., D) the change of a law, from units (..., U)."""
        return self.out(mixed)

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
            width, theirs = state["new.weight"].shape
            found = cls(theirs, width)
            found.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no corrector of drafts: {error}") from None
        if theirs != hidden_size:
            raise ValueError(
                f"the corrector {path} is of a model of width {theirs}, this one has {hidden_size}; train "
                "one for this model by `sjd2 corrector`"
            )
        return found.requires_grad_(False)


def code_rows(table: Float[Tensor, "rows D"], num_codes: int) -> Float[Tensor, "codes D"]:
    """(K + 1, D) embeddings of codes, each of mean square 1; row K, of what is not known, is zero."""
    return F.pad(F.rms_norm(table[:num_codes].float(), (table.shape[1],)), (0, 0, 0, 1))
