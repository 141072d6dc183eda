"""A causal language model of transformers that can think in latents: GPT-2 or Llama, new or from a folder.

PCCoT (arXiv 2506.18582) adds three marks to the vocabulary, <bot>, <latent> and <eot>, and a projection of
hidden states to inputs. The marks are vectors of their own here: a folder's vocabulary stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sjd2_lightning.models.hub import HubName, located
from sjd2_lightning.models.lora import LoraSettings, add_lora, plain_state
from sjd2_lightning.run.files import write_whole
from sjd2_lightning.run.values import Natural, Within, wrong_values

SETTINGS, WEIGHTS = "thinker.json", "thinker.safetensors"
_EOS = "<eos>"  # of the text tokenizer of new models
_LAYERS = {"gpt2": "h"}  # what a trunk calls its layers, where it is not `layers`


@dataclass(frozen=True)
class ThinkerSizes:
    """The language model.

    Attributes:
        path: folder, or name on the hub, of a causal language model of transformers with its tokenizer; None
            makes a new one over bytes, of the sizes below.
        family: architecture of a new model.
        width, num_layers, num_heads, num_positions: its sizes.
    """

    path: str | None = None
    family: Literal["gpt2", "llama"] = "gpt2"
    width: Annotated[int, Within(1, 2**16)] = 64
    num_layers: Annotated[int, Within(1, 1000)] = 2
    num_heads: Annotated[int, Within(1, 1000)] = 2
    num_positions: Annotated[int, Within(8, 2**20)] = 192

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if self.num_heads > 0 and self.width % (2 * self.num_heads):
            found.append(f"width={self.width}: must be a multiple of 2 num_heads={2 * self.num_heads}")
        path = self.path
        if path is not None and HubName.of(path) is None and not (Path(path) / "config.json").is_file():
            found.append(f"path={path}: there is no config.json in it; give a folder of transformers")
        return found


@dataclass(frozen=True)
class ThoughtSettings:
    """What a model was trained to think like: properties of its weights.

    Attributes:
        num_latents: c, latents between question and answer.
        num_passes: T, parallel passes over them; 0 leaves them pause tokens, c or more is the chain.
        projection: from hidden states to the inputs of latents: none; scale (ours), a factor that is learnt
            and begins with latents of the size of tokens; or mlp, CODI's two layers with a norm.
        answer_prompt: text in front of the answer; a model's hidden states are distilled at its last token.
    """

    num_latents: Natural = 8
    num_passes: Natural = 3
    projection: Literal["none", "scale", "mlp"] = "none"
    answer_prompt: str = "The answer is:"

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, starting with the key."""
        found = wrong_values(self)
        if self.num_passes > 0 and not self.num_latents:
            found.append(
                f"num_latents=0: num_passes={self.num_passes} has nothing to pass over; set num_passes=0"
            )
        if not self.answer_prompt.strip():
            found.append("answer_prompt='': give a text; the answer begins behind it")
        return found


class Past(NamedTuple):
    """What a model keeps of columns that it read; feeding leaves it as it was.

    Attributes:
        layers: keys and values of each layer, (B, heads, P, head width).
        mask: (B, P) 1 for a column, 0 for padding.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def cut(self, length: int) -> Past:
        """The first `length` columns."""
        layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        return Past(layers, self.mask[:, :length])


class Fed(NamedTuple):
    """What a model made of columns.

    Attributes:
        hidden: (B, L, d) last hidden states, behind the final norm.
        past: what it keeps, these columns included.
        layers: (B, L, d) hidden states behind each layer, the last behind the final norm; or none.
    """

    hidden: Tensor
    past: Past
    layers: tuple[Tensor, ...]


class Scale(nn.Module):
    """Latents of the size of tokens: a factor that is learnt.

    Args:
        factor: its first value.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.factor * hidden


class Thinker(nn.Module):
    """A language model, its marks and its projection.

    Args:
        model: causal language model of transformers.
        tokenizer: its text tokenizer, with an end token.
        settings: how it thinks.

    Attributes:
        prompt: token ids of the answer prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ThoughtSettings) -> None:
        super().__init__()
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        table = model.get_input_embeddings().weight
        width = table.shape[1]
        (self.prompt,) = self.ids([settings.answer_prompt])
        self.marks = nn.Parameter(table.detach().std() * torch.randn(3, width))
        self.projection: nn.Module = nn.Identity()
        if settings.projection == "scale":
            self.projection = Scale(float(table.detach().std()))
        if settings.projection == "mlp":
            self.projection = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
            )

    @property
    def trunk(self) -> Any:
        """The language model without its head."""
        return self.model.base_model

    @property
    def end(self) -> int:
        """Id of the token behind an answer."""
        return int(self.tokenizer.eos_token_id)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens; one call for many is much faster than many."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(ids)))

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L, d) embeddings of token ids (B, L)."""
        return self.model.get_input_embeddings()(ids)

    def mark(self, name: Literal["bot", "latent", "eot"], rows: int, count: int = 1) -> Tensor:
        """(rows, count, d) embeddings of a mark."""
        place = ("bot", "latent", "eot").index(name)
        return self.marks[place].expand(rows, count, -1)

    def padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids (B, L), filled with end tokens on one side, and their mask (B, L)."""
        length = max(map(len, rows))
        fill = [length - len(row) for row in rows]
        pairs = list(zip(rows, fill, strict=True))
        ids = [[self.end] * n + list(row) if left else list(row) + [self.end] * n for row, n in pairs]
        mask = [[0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n for row, n in pairs]
        device = self.marks.device
        shape = (len(rows), length)
        return (
            torch.tensor(ids, dtype=torch.long, device=device).view(shape),
            torch.tensor(mask, dtype=torch.long, device=device).view(shape),
        )

    def feed(
        self, columns: Tensor, past: Past | None = None, mask: Tensor | None = None, all_layers: bool = False
    ) -> Fed:
        """One pass over columns behind what was read before; positions count columns that are no padding.

        Args:
            columns: (B, L, d) inputs.
            past: what the model keeps of the columns before.
            mask: (B, L) 1 for a column, 0 for padding; None is no padding.
            all_layers: whether the hidden states of every layer are wanted.
        """
        from transformers import DynamicCache

        from sjd2_lightning.models.trunk import cache_argument

        own = torch.ones(columns.shape[:2], dtype=torch.long, device=columns.device) if mask is None else mask
        seen = own if past is None else torch.cat([past.mask, own], dim=1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -columns.shape[1] :]
        cache = DynamicCache(None if past is None else past.layers)
        out = self.trunk(
            inputs_embeds=columns,
            attention_mask=seen,
            position_ids=positions,
            use_cache=True,
            output_hidden_states=all_layers,
            **{cache_argument(self.trunk): cache},
        )
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        return Fed(out.last_hidden_state, Past(layers, seen), out.hidden_states[1:] if all_layers else ())

    def project(self, hidden: Tensor) -> Tensor:
        """(B, L, d) inputs of latents that hidden states (B, L, d) become."""
        return self.projection(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) scores of the next token, by the head of the language model."""
        return self.model.get_output_embeddings()(hidden)

    def add_lora(self, settings: LoraSettings) -> None:
        """Trains a low-rank adapter in place of the language model; marks and projection are trained too.

        Raises:
            ValueError: a target names no linear map of the model, or it is to act on noisy tokens.
        """
        if settings.noisy_only:
            raise ValueError("pccot.lora.noisy_only=true: thoughts hold no noisy tokens; set it to false")
        layers = _LAYERS.get(self.model.config.model_type, "layers")
        add_lora(self.model, self.model.base_model_prefix, settings, layers)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that transformers reads, adapter merged; beside it marks, projection, settings."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        plain = transformers.AutoModelForCausalLM.from_config(self.model.config)
        plain.load_state_dict(plain_state(self.model))
        plain.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        own = {k: v.detach().contiguous() for k, v in self.state_dict().items() if not k.startswith("model.")}
        write_whole(Path(folder) / WEIGHTS, save(own))
        write_whole(Path(folder) / SETTINGS, json.dumps(asdict(self.settings), indent=2) + "\n")


def build_thinker(sizes: ThinkerSizes, settings: ThoughtSettings) -> Thinker:
    """A model that has yet to learn to think: new, or a language model from a folder.

    Raises:
        ValueError: wrong values, or a folder that is no causal language model with a tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from sjd2_lightning.models.small import byte_tokenizer  # loads the libraries of all families

    if found := [*(f"model.{line}" for line in sizes.problems()), *settings.problems()]:
        raise ValueError("; ".join(f"pccot.{line}" for line in found))
    if sizes.path is not None:
        return Thinker(*_pretrained(located(sizes.path, "pccot.model.path"), "pccot.model.path"), settings)
    tokenizer = byte_tokenizer(1, {_EOS: 0})
    tokenizer.eos_token = _EOS
    common = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    common |= {"initializer_range": sizes.width**-0.5, "tie_word_embeddings": False}
    own = (
        {
            "n_embd": sizes.width,
            "n_layer": sizes.num_layers,
            "n_head": sizes.num_heads,
            "n_positions": sizes.num_positions,
            "activation_function": "gelu_pytorch_tanh",  # GPT-2's own function, in one kernel
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
        if sizes.family == "gpt2"
        else {
            "hidden_size": sizes.width,
            "intermediate_size": 4 * sizes.width,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_heads,
            "num_key_value_heads": sizes.num_heads,
            "max_position_embeddings": sizes.num_positions,
        }
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.family, **common, **own))
    return Thinker(model, tokenizer, settings)


def load_thinker(folder: str | Path) -> Thinker:
    """The model that `Thinker.save` wrote, in eval mode.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    try:
        settings = ThoughtSettings(**json.loads((folder / SETTINGS).read_text()))
        thinker = Thinker(*_pretrained(folder, "weights"), settings)
        missing, unexpected = thinker.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        if unexpected or any(not name.startswith("model.") for name in missing):
            raise ValueError(f"{WEIGHTS} does not fit {SETTINGS}")
    except (OSError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"no thinking model in {folder} ({str(error).splitlines()[0]}); train one with experiment=pccot"
        ) from error
    return thinker.eval()


def _pretrained(folder: Path, key: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, from a folder alone."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{key}={folder}: no causal language model with a tokenizer ({str(error).splitlines()[0]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{key}={folder}: its tokenizer has no end token; set eos_token in its configuration"
        )
    return model, tokenizer
