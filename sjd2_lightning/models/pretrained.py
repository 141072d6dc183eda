"""What the adapters of transformers' models share: trunk, cache, sliced head, saving, modes of training.

An adapter adds ids, layout and prompt. Models are used as transformers builds them: neither patched nor
subclassed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sjd2_lightning.masks import Visible, additive
from sjd2_lightning.models.attention import EITHER, blocks_of
from sjd2_lightning.models.backbone import Backbone, ImageLayout, Trunk
from sjd2_lightning.models.image_tokenizer import ImageTokenizer
from sjd2_lightning.models.kv_cache import KVCache
from sjd2_lightning.models.lora import (
    LoraSettings,
    add_lora,
    has_adapter,
    layers_alike,
    load_adapter,
    plain_state,
    save_adapter,
)
from sjd2_lightning.models.recompute import checkpoint_arguments
from sjd2_lightning.models.rounding import round_to_decode
from sjd2_lightning.models.trunk import ARTEFACTS, EagerTrunk, InvariantTrunk, LayeredTrunk, cache_argument
from sjd2_lightning.models.weights import ADAPTER, BACKBONE_FILE, TEXT, TRUNK

PROMPT = "{prompt}"  # place of a user's words in a template


@dataclass(frozen=True)
class PromptTokens:
    """Control tokens and templates of a family; subclasses add theirs.

    Attributes:
        unconditional: which context guidance compares with, one of the family's `CONTEXTS`. Published
            scripts of one model differ in it, so it is part of what a backbone is saved with.
    """

    CONTEXTS: ClassVar[tuple[str, ...]] = ()

    unconditional: str

    def __post_init__(self) -> None:
        if self.unconditional not in self.CONTEXTS:
            raise ValueError(
                f"model.unconditional={self.unconditional}: must be one of {', '.join(self.CONTEXTS)}"
            )
        template = getattr(self, "template", PROMPT)
        try:
            usable = PROMPT in template and bool(template.format(width=1, height=1, prompt="a"))
        except (KeyError, IndexError, ValueError):
            usable = False
        if not usable:
            raise ValueError(
                f"{BACKBONE_FILE}: template={template!r} must hold {PROMPT}, and in braces nothing else but "
                "width and height"
            )


class PretrainedBackbone(Backbone):
    """A transformers model behind the Backbone protocol.

    Args:
        model: the whole model; its trunk lies at `TRUNK_PATH`.
        text_tokenizer: tokenizer of prompts.
        image_tokenizer: both ways.
        tokens: control tokens and templates.
    """

    FAMILY: ClassVar[str]
    MODEL: ClassVar[Any]  # the class of transformers
    TRUNK_PATH: ClassVar[str]
    UNTRAINED: ClassVar[tuple[str, ...]]  # parts of the model that drawing images from text does not use
    FILES: ClassVar[tuple[str, ...]] = ()  # of a plain Hugging Face folder, beside weights and tokenizer.json
    PLACES: ClassVar[tuple[str, str]] = ("", "")  # sub-folders of a release with weights and text tokenizer
    CONVERTED: ClassVar[bool] = False  # whether a release is converted before it can be loaded
    GRIDS: ClassVar[int] = 1  # of codes in a sequence
    NEWLINE: ClassVar[bool] = False  # whether every row of codes but the last ends in one

    def __init__(
        self,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: ImageTokenizer,
        tokens: PromptTokens,
    ) -> None:
        super().__init__()
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self._tokens = tokens
        self._control = frozenset(text_tokenizer.added_tokens_decoder)
        if isinstance(image_tokenizer, nn.Module):
            image_tokenizer.requires_grad_(False)
        for part in self.UNTRAINED:
            model.get_submodule(part).requires_grad_(False)
        self._cache_name = cache_argument(self.trunk)
        self.compiled = False
        self.quantized: str | None = None  # what `quantize` was asked for
        self.num_codes = image_tokenizer.num_codes
        self.hidden_size = model.config.get_text_config().hidden_size
        self.num_positions = model.config.get_text_config().max_position_embeddings
        self.train(model.training)

    @classmethod
    def release_config(cls, name: str) -> Any:
        """Configuration of a release as far as known here, for plans before its config.json is there.

        Args:
            name: hub id and path in lower case, which say the size of a family of several.
        """
        return cls.MODEL.config_class(vocabulary_map={"<image>": 0})

    @classmethod
    def codes_of_config(cls, config: Any) -> tuple[int, int]:
        """Size of the codebook, and pixels that a code covers on each side, by the model's configuration."""
        vq = config.vq_config
        num_codes = getattr(vq, "codebook_size", None) or vq.num_embeddings
        return int(num_codes), 2 ** (len(vq.channel_multiplier) - 1)

    @classmethod
    def num_slots(cls, height: int, width: int) -> int:
        """Number of slots of an image of (height, width) codes."""
        return height * (width + cls.NEWLINE) - cls.NEWLINE

    @property
    def trunk(self) -> Any:
        """The transformer between embeddings and heads, a module of transformers."""
        return self.model.get_submodule(self.TRUNK_PATH)

    def train(self, mode: bool = True) -> PretrainedBackbone:
        """Train mode for the trunk; parts that are not trained, image tokenizers first, stay in eval mode."""
        super().train(mode)
        for part in self.UNTRAINED:
            self.model.get_submodule(part).eval()
        if isinstance(self.image_tokenizer, nn.Module):
            self.image_tokenizer.eval()
        return self

    def checkpoint_activations(self, kind: Literal["full", "selective"] = "full") -> None:
        """Keeps layer inputs, and what `kind` names, for the backward pass in train mode; see `recompute`."""
        # transformers renamed it: 5.24 says `activation_`
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)(checkpoint_arguments(kind))

    def compile_layers(self, backend: Any = "inductor") -> None:
        """Compiles the layers for passes without a cache, once a shape; decoding's own way is in `trunk`."""
        for layer in self.trunk.layers:
            layer.compile(fullgraph=True, dynamic=False, backend=backend)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, ARTEFACTS)
        self.compiled = True

    def attend_flexibly(self) -> None:
        """Takes FlexAttention where `forward` is given what queries see, and SDPA under a dense mask."""
        self.trunk.config._attn_implementation = EITHER
        self.takes_visible = True

    def add_lora(self, settings: LoraSettings, folder: str | Path | None = None) -> None:
        """Trains a low-rank adapter of the trunk instead of the model's weights.

        Args:
            settings: sizes of a new adapter.
            folder: a saved adapter to go on from; it has its own settings.

        Raises:
            ValueError: for unknown targets, an adapter that does not fit, or quantised weights.
        """
        self._refuse_quantized("train an adapter of")
        mode = self.model.training
        self.requires_grad_(False)
        if folder is None:
            self.noise_gate = add_lora(self.model, self.TRUNK_PATH, settings)
        else:
            self.noise_gate = load_adapter(self.model, folder)
            self.read_corrector(folder)
        self.train(mode)  # new modules start in train mode

    def quantize(self, kind: Literal["int8", "fp8"], device: str | torch.device) -> None:
        """Rounds the weights of the trunk's linear layers, one scale a row, by torchao; activations stay.

        At batch 1 a pass takes as long as its weights take to be read, and these become half of bfloat16's.
        Embeddings and heads stay whole: they are read in parts (`slot_table`, `image_logits`).

        Args:
            kind: "int8", or "fp8" (e4m3).
            device: where the backbone will decode; its weights may be elsewhere yet.

        Raises:
            ValueError: torchao is not installed; fp8 on a device without it; an adapter or quantised weights.
        """
        self._refuse_quantized("quantise")
        if has_adapter(self.model) and self.noise_gate is None:
            raise ValueError(
                f"model.quantize={kind}: the model has an adapter; evaluate the exported folder, where it is "
                "merged"
            )
        round_to_decode(self.trunk.layers, kind, torch.device(device))
        self.requires_grad_(False)
        self.quantized = kind

    def _refuse_quantized(self, what: str) -> None:
        if self.quantized is not None:
            raise ValueError(
                f"model.quantize={self.quantized}: cannot {what} rounded weights; set model.quantize=null"
            )

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return self.trunk.get_input_embeddings()(token_ids)

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Visible,
        cache: KVCache | None = None,
        noisy: Tensor | None = None,
    ) -> Tensor:
        mask: Any = attention_mask
        mask = blocks_of(mask) if isinstance(mask, Visible) else additive(mask, embeddings.dtype)
        decodes = self.compiled and cache is not None
        if self.compiled and torch.is_grad_enabled() and not embeddings.requires_grad:
            # behind frozen embeddings the first layer would be compiled apart from the others
            embeddings = embeddings.detach().requires_grad_()
        with self.gated(noisy), torch.compiler.set_stance("force_eager") if decodes else nullcontext():
            return self.trunk(
                inputs_embeds=embeddings,
                position_ids=position_ids,
                attention_mask=mask,
                use_cache=False,
                **{self._cache_name: cache},
            ).last_hidden_state

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KVCache(
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            max_len,
            head_dim,
            dtype=next(self.trunk.parameters()).dtype,
            device=self.device,
        )

    def decoding_trunk(self, compiled: bool, invariant: bool, flex: bool = False) -> Trunk:
        alike = layers_alike(self.trunk.layers)
        if invariant and not alike:
            raise ValueError(
                "decoding.invariant=true: the adapter changes the trunk's layers in different ways; set it "
                "to false, or evaluate the exported folder, where it is merged"
            )
        if invariant:
            return InvariantTrunk(self)
        return LayeredTrunk(self, flex) if compiled and alike else EagerTrunk(self)

    def decode_images(self, image_ids: Tensor, layout: ImageLayout | None = None) -> Tensor:
        return self.image_tokenizer.decode(image_ids)

    def text_ids(self, template: Sequence[str], prompt: str = "") -> list[int]:
        """Token ids of a text, without the tokens that a tokenizer adds by itself.

        Names of control tokens count in the template; in the prompt, which a user wrote, they are letters.

        Args:
            template: parts of the text; the prompt stands between any two.
            prompt: words of a user.
        """
        text = prompt.join(template)
        found = self.text_tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        control = [
            (token_id, start, end)
            for token_id, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
            if token_id in self._control
        ]
        places = _places_of(prompt, template)
        kept = [one for one in control if not any(one[1] < end and start < one[2] for start, end in places)]
        if len(kept) == len(control):
            return found["input_ids"]
        ids, done = [], 0
        for token_id, start, end in kept:
            ids += [*self._letters(text[done:start]), token_id]
            done = end
        return ids + self._letters(text[done:])

    def _letters(self, text: str) -> list[int]:
        """Token ids of a text without control tokens: what the tokenizer does between two of them."""
        tokenizer = self.text_tokenizer.backend_tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text] if text else []
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in tokenizer.model.tokenize(word)]

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes weights and everything needed to load them again into a local folder.

        A low-rank adapter lies in `adapter/`, and is merged into the weights too if it acts on all tokens.
        `backbone.json` comes last, behind what families write too: a folder that has it is whole.

        Raises:
            ValueError: for quantised weights.
        """
        self._refuse_quantized("save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)  # of weights that lay here before
        if has_adapter(self.model):
            save_adapter(self.model, folder / ADAPTER, self.noise_gate is not None)
            self.write_corrector(folder / ADAPTER)
        self.write_corrector(folder)
        plain = plain_state(self.model, merged=self.noise_gate is None)
        state = {name: value.to(dtype or value.dtype) for name, value in plain.items()}
        self.model.save_pretrained(folder / TRUNK, state_dict=state, safe_serialization=True)
        self.text_tokenizer.save_pretrained(folder / TEXT)
        fields = json.dumps({"family": self.FAMILY, **asdict(self._tokens)}, indent=2)
        (folder / BACKBONE_FILE).write_text(fields)


def _places_of(prompt: str, template: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end of each prompt in the text that a template makes with it."""
    starts = [
        sum(map(len, template[:number])) + (number - 1) * len(prompt) for number in range(1, len(template))
    ]
    return [(start, start + len(prompt)) for start in starts]


class VocabularyBackbone(PretrainedBackbone):
    """A model whose vocabulary holds the codes, as those of Lumina-mGPT, Emu3 and SimpleAR.

    Args:
        code_to_token: token id of every code.
        newline: token id behind every row of codes; None for a model without.
        closing: token ids behind the last row, as in the published sequences.
    """

    NEWLINE = True
    slot_token_ids: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: ImageTokenizer,
        tokens: PromptTokens,
        code_to_token: dict[int, int],
        newline: int | None = None,
        closing: Sequence[int] = (),
    ) -> None:
        super().__init__(model, text_tokenizer, image_tokenizer, tokens)
        if len(code_to_token) != self.num_codes:
            raise ValueError(
                f"the image tokenizer has {self.num_codes} codes, the model's vocabulary names "
                f"{len(code_to_token)}: they are not of one model"
            )
        ids = torch.tensor([code_to_token[code] for code in range(self.num_codes)])
        self._first_code = int(ids.min())
        self._num_rows = int(ids.max()) + 1 - self._first_code
        self._closing = list(closing)
        structural = torch.tensor([newline] if self.NEWLINE else [], dtype=torch.long)
        slot_token_ids = torch.cat([ids, structural])
        self.register_buffer("slot_token_ids", slot_token_ids, persistent=False)
        in_order = torch.arange(self._first_code, self._first_code + self.num_codes)
        self._columns_in_order = torch.equal(ids, in_order)

    def slot_table(self) -> Tensor:
        return self.embed_tokens(self.slot_token_ids)

    def image_head(self) -> Tensor | None:
        head = self.model.lm_head
        plain = isinstance(head, nn.Linear) and head.bias is None and self._columns_in_order
        return head.weight.narrow(0, self._first_code, self._num_rows) if plain else None

    def image_logits(self, hidden: Tensor) -> Tensor:
        head = self.model.lm_head
        if isinstance(head, nn.Linear):
            # the rows of codes alone: all else would be masked anyway, and they are a fraction of the head
            logits = F.linear(hidden, head.weight.narrow(0, self._first_code, self._num_rows))
        else:  # with an adapter, which is part of it
            logits = head(hidden).narrow(-1, self._first_code, self._num_rows)
        if self._columns_in_order:
            return logits
        return logits.index_select(-1, self.slot_token_ids[: self.num_codes] - self._first_code)
