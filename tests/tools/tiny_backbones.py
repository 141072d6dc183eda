"""Backbones small enough to enumerate: a fake one whose table is the law, and random Chameleons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import VQModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerFast

from sjd2_lightning.models.backbone import Backbone, ImageLayout, rows_with_newlines
from sjd2_lightning.models.chameleon import ChameleonBackbone, ChameleonTokens
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer
from sjd2_lightning.models.kv_cache import KVCache

WORDS = ("red", "green", "blue", "cat", "dog", "on", "a", "mat")
PIXELS_PER_CODE = 2  # of the tiny image tokenizer
NOISY_LEVELS = ((0, 1, 1, 2, 3, 0), (0,) * 6, (3, 3, 0, 0, 1, 2), (1, 2, 3, 3, 3, 3))  # of 4 images, 3 x 2
RAGGED_PROMPTS = ("red cat", "dog on a green mat", "blue", "a red dog on a blue cat")


class TableBackbone(Backbone):
    """A law that is looked up: logits[prompt, last but one token, last token].

    A prompt is words "p0", "p1", ...: the sum of their numbers picks the law, so prompts of one law may
    differ in length; "p0" is also the unconditional context. The two tokens are read out of the embeddings
    of the visible columns, so a wrong mask, cache entry or column changes the law. A noisy embedding counts
    as its largest entry.

    Args:
        logits: (prompts, K + 2, K + 2, K); token K is the newline, K + 1 a prompt token.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.num_codes = logits.shape[-1]
        self.hidden_size = self.num_codes + 3
        self.table = nn.Parameter(logits, requires_grad=False)

    def layout(self, height: int, width: int) -> ImageLayout:
        return rows_with_newlines(height, width, self.num_codes, (height, width))

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        return [int(word.removeprefix("p")) for word in prompt.split()]

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        return [0]

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        flag = F.one_hot(torch.full_like(token_ids, self.num_codes + 1), self.hidden_size).float()
        flag[..., -1] = token_ids.float()
        return flag

    def slot_table(self) -> Tensor:
        return torch.eye(self.num_codes + 1, self.hidden_size)

    def forward(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: KVCache | None = None,
        noisy: Tensor | None = None,
    ) -> Tensor:
        keys = (
            embeddings
            if cache is None
            else cache.update(embeddings[:, None], embeddings[:, None], 0)[0][:, 0]
        )
        visible = attention_mask[:, 0]
        columns = torch.arange(visible.shape[-1])
        own = (visible * columns).amax(-1)
        before = (visible & (columns < own[..., None])).mul(columns).amax(-1)  # the last but its own
        kinds = keys[..., :-1].argmax(-1)[:, None].expand_as(visible)
        last = kinds.gather(-1, own[..., None])[..., 0]
        seen = visible.gather(-1, before[..., None])[..., 0] & (own > 0)
        last_but_one = kinds.gather(-1, before[..., None])[..., 0].where(
            seen, torch.tensor(self.num_codes + 1)
        )
        prompt = (visible * keys[:, None, :, -1]).sum(-1).round().long()
        return self.table[prompt.clamp(0, len(self.table) - 1), last_but_one, last]

    def image_logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        return KVCache(1, batch, 1, max_len, self.hidden_size, dtype=torch.float32, device=self.device)

    def decode_images(self, image_ids: Tensor, layout: ImageLayout | None = None) -> Tensor:
        raise NotImplementedError

    def save(self, folder: object, dtype: torch.dtype | None = None) -> None:
        raise NotImplementedError


def strong_table(
    num_codes: int = 3, num_prompts: int = 4, seed: int = 0, scale: float = 1.5
) -> TableBackbone:
    """A table of independent normal logits: every token depends strongly on the two before it."""
    rng = torch.Generator().manual_seed(seed)
    return TableBackbone(
        scale * torch.randn(num_prompts, num_codes + 2, num_codes + 2, num_codes, generator=rng)
    )


def word_tokenizer(first_id: int, words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word, ids from `first_id` on; unknown words share the last id."""
    vocab = {word: first_id + number for number, word in enumerate((*words, "<unk>"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def tiny_image_tokenizer(num_codes: int, patch: int = PIXELS_PER_CODE) -> VQImageTokenizer:
    """Random weights; one code covers patch x patch pixels."""
    channels = 3 * patch**2
    vq = VQModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=num_codes,
        norm_num_groups=4,
        vq_embed_dim=4,
        mid_block_add_attention=False,
    )
    return VQImageTokenizer(vq).eval()


def code_names(token_ids: Sequence[int]) -> dict[str, int]:
    """A vocabulary map that names code i as the released model does and gives it `token_ids[i]`."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    return {f"IMGIMG{str(code).translate(letters)}Z": token for code, token in enumerate(token_ids)}


def tiny_chameleon(
    num_codes: int = 3,
    num_layers: int = 2,
    hidden_size: int = 8,
    seed: int = 0,
    scale: float = 1.0,
    code_order: Sequence[int] | None = None,
) -> ChameleonBackbone:
    """A Chameleon of random weights behind the shipped adapter; its laws depend strongly on the context.

    Args:
        num_codes: K.
        scale: scale of the head: larger is more peaked.
        code_order: code i has token id 4 + code_order[i]; in order by default.
    """
    torch.manual_seed(seed)
    control = 4 + num_codes
    first_word = control + 12
    order = range(num_codes) if code_order is None else code_order
    config = ChameleonConfig(
        vocab_size=first_word + len(WORDS) + 1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=None,
        vocabulary_map={"<image>": control, **code_names([4 + place for place in order])},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": num_codes,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "attn_type": "none",
        },
    )
    config._attn_implementation = "sdpa"
    model = ChameleonForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "norm" not in name:  # 0.02 of the class makes every law nearly uniform
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    nn.init.normal_(model.model.embed_tokens.weight)
    nn.init.normal_(model.lm_head.weight, std=scale * 2.5 * hidden_size**-0.5)
    tokens = ChameleonTokens(
        bos=0,
        separator=control + 1,
        boi=control + 2,
        newline=control + 3,
        size_base=control + 4,
        size_unit=PIXELS_PER_CODE,
        template="{prompt}",
    )
    return ChameleonBackbone(model, word_tokenizer(first_word), tiny_image_tokenizer(num_codes), tokens)
