"""Lumina-mGPT and its miniature: adapter of transformers' Chameleon."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ChameleonForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.backbone import Backbone, ImageLayout, rows_with_newlines
from sjd2_lightning.models.cache import KVCache
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer, load_image_tokenizer


@dataclass(frozen=True)
class ChameleonTokens:
    """Control tokens and prompt template of a Chameleon-type model; the defaults are Lumina-mGPT's.

    Layout: bos, text, separator, boi, size_base + height / size_unit, size_base + width / size_unit, then
    rows of codes with `newline` behind each.
    """

    bos: int = 0
    separator: int = 8710
    boi: int = 8197
    newline: int = 8803
    size_base: int = 8804
    size_unit: int = 32
    template: str = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"


class ChameleonBackbone(Backbone):
    """`ChameleonForConditionalGeneration` behind the Backbone protocol.

    `ChameleonForConditionalGeneration.forward` masks every image logit, so trunk and head are called apart.
    """

    slot_token_ids: Tensor

    def __init__(
        self,
        model: ChameleonForConditionalGeneration,
        text_tokenizer: PreTrainedTokenizerFast,
        image_tokenizer: VQImageTokenizer,
        tokens: ChameleonTokens,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.image_tokenizer.requires_grad_(False)
        image_to_token = model.model.vocabulary_mapping.img2bpe
        self.num_codes = len(image_to_token)
        self.hidden_size = model.config.hidden_size
        ids = torch.tensor([image_to_token[code] for code in range(self.num_codes)])
        self._first_code = int(ids.min())
        slot_token_ids = torch.cat([ids, torch.tensor([tokens.newline])])
        self.register_buffer("slot_token_ids", slot_token_ids, persistent=False)
        in_order = torch.equal(ids, torch.arange(self._first_code, self._first_code + self.num_codes))
        self._columns_in_order = in_order

    def layout(self, height: int, width: int) -> ImageLayout:
        step = self.image_tokenizer.downsample
        unit = self.tokens.size_unit
        if min(height, width) < unit or height % unit or width % unit:
            raise ValueError(f"image size {width}x{height} must be a positive multiple of {unit} pixels")
        return rows_with_newlines(height // step, width // step, self.num_codes, (height, width))

    def unconditional_ids(self, layout: ImageLayout) -> list[int]:
        t = self.tokens
        height, width = layout.pixels
        return [t.boi, t.size_base + height // t.size_unit, t.size_base + width // t.size_unit]

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        if not prompt.strip():
            raise ValueError("empty prompt: give at least one word")
        height, width = layout.pixels
        text = self.tokens.template.format(width=width, height=height, prompt=prompt)
        text_ids = self.text_tokenizer.encode(text, add_special_tokens=False)
        return [self.tokens.bos, *text_ids, self.tokens.separator, *self.unconditional_ids(layout)]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens(token_ids)

    def slot_table(self) -> Tensor:
        return F.embedding(self.slot_token_ids, self.model.model.embed_tokens.weight)

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        return self.model.model(
            inputs_embeds=embeddings,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state

    def image_logits(self, hidden: Tensor) -> Tensor:
        rows = self.model.lm_head.weight.narrow(0, self._first_code, self.num_codes)
        logits = F.linear(hidden, rows)
        if self._columns_in_order:
            return logits
        return logits.index_select(-1, self.slot_token_ids[: self.num_codes] - self._first_code)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        config = self.model.config
        return KVCache(
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            max_len,
            config.hidden_size // config.num_attention_heads,
            dtype=self.model.dtype,
            device=self.device,
        )

    def decode_images(self, image_ids: Tensor) -> Tensor:
        return self.image_tokenizer.decode(image_ids)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.to(dtype or value.dtype) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder / "trunk", state_dict=state, safe_serialization=True)
        self.text_tokenizer.save_pretrained(folder / "text")
        self.image_tokenizer.save(folder / "tokenizer")
        (folder / "backbone.json").write_text(
            json.dumps({"family": "chameleon", **asdict(self.tokens)}, indent=2)
        )


def load_chameleon(
    folder: str | Path, trunk: str = "trunk", dtype: torch.dtype = torch.float32
) -> ChameleonBackbone:
    """Loads a local folder: `backbone.json`, `trunk/`, `text/`, `tokenizer/`.

    Args:
        folder: the backbone folder.
        trunk: its sub-folder with the trunk's weights, or any other path to them.
        dtype: of the trunk.

    Raises:
        ValueError: if a part is missing; the message names it.
    """
    folder = Path(folder)
    trunk_folder = folder / trunk if (folder / trunk).is_dir() else Path(trunk)
    for needed in (
        folder / "backbone.json",
        trunk_folder / "model.safetensors",
        folder / "text" / "tokenizer.json",
    ):
        if not needed.is_file():
            raise ValueError(f"no backbone in {folder}: {needed} is missing; set model.path and model.trunk")
    fields = json.loads((folder / "backbone.json").read_text())
    if fields.pop("family", None) != "chameleon":
        raise ValueError(f"{folder / 'backbone.json'} is not of a Chameleon-type model")
    model = ChameleonForConditionalGeneration.from_pretrained(
        trunk_folder, dtype=dtype, use_safetensors=True, local_files_only=True, attn_implementation="sdpa"
    )
    text = PreTrainedTokenizerFast.from_pretrained(folder / "text", local_files_only=True)
    return ChameleonBackbone(
        model, text, load_image_tokenizer(folder / "tokenizer"), ChameleonTokens(**fields)
    )
