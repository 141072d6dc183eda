"""Speculative Jacobi-Denoising Decoding as a generation method of transformers.

It draws the codes of an image behind a prompt that the model's own processor wrote: the same tokens as
`sjd2_lightning.decoding.decode`, in fewer passes than one a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.generation import GenerateDecoderOnlyOutput

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.chameleon import LUMINA_MGPT, ChameleonBackbone
from sjd2_lightning.models.emu3 import Emu3Backbone, Emu3Tokens
from sjd2_lightning.models.glm_image import GlmImageBackbone, GlmImageTokens, draft_of
from sjd2_lightning.models.image_tokenizer import VQImageTokenizer
from sjd2_lightning.models.pretrained import VocabularyBackbone
from sjd2_lightning.noise import NoiseProcess

_UNTOUCHED = ("logits_processor", "stopping_criteria", "assistant_model", "streamer", "inputs_embeds")

_PIXELS = 16  # that a code of Lumina-mGPT covers on each side


class _Given:
    """Prompts are ids, not texts: prompt "3" is row 3 of what `generate` was given."""

    rows: Sequence[list[int]] = ()
    empty_rows: Sequence[list[int]] = ()

    def prompt_ids(self, prompt: str, layout: ImageLayout) -> list[int]:
        return self.rows[int(prompt)]

    def unconditional_ids(self, layout: ImageLayout, prompt_ids: Sequence[int] = ()) -> list[int]:
        return self.empty_rows[list(self.rows).index(list(prompt_ids))]


class _Chameleon(_Given, ChameleonBackbone):
    pass


class _Emu3(_Given, Emu3Backbone):
    pass


class _GlmImage(_Given, GlmImageBackbone):
    pass


class _CodesOnly(VQImageTokenizer):
    """Sizes of a Chameleon's image tokenizer; images are for the script to decode."""

    identity = ""

    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)
        # the encoder that a configuration names is not the one of the images' codes
        self.num_codes, self.downsample = ChameleonBackbone.codes_of_config(config)[0], _PIXELS


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    window: int = 32,
    num_levels: int = 0,
    noise: dict[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    **others: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Token ids (B, L): the prompts as they were given, then the image with its row ends and closing tokens.

    `do_sample`, `temperature`, `top_k`, `top_p` and `guidance_scale` count as in `generate`, looked for
    in its arguments, `generation_config` and the model's; what is nowhere bans nothing. Which tokens may
    stand where is known here: `prefix_allowed_tokens_fn` and lengths are not asked.

    Args:
        model: a Chameleon in Lumina-mGPT's vocabulary, an Emu3 or a GLM-Image of transformers.
        inputs: (B, P) ids of the prompts, left-padded as `attention_mask` says; or `input_ids`.
        generation_config: of transformers.
        negative_prompt_ids: (B, Q) ids of the empty side of guidance, with their mask.
        negative_prompt_attention_mask: (B, Q).
        seed: seed of the first row, the others have the next ones; or one for each; None: by torch's.
        window: slots drafted ahead.
        num_levels: noisy levels a new slot passes; 0 for weights that never saw noise.
        noise: fields of the noise process that training showed, as in the weights' settings.json.
        image_size: (height, width) in pixels; needed by Emu3 alone, whose prompts write it in digits.

    Raises:
        ValueError: another model, arguments that cannot be kept to, or values that decoding refuses.
    """
    for name in _UNTOUCHED:
        if others.get(name) is not None and others.get(name) != []:
            raise ValueError(f"custom_generate=sjd2: {name} has no meaning here; leave it out")
    token_ids = inputs if inputs is not None else others.get("input_ids")
    if token_ids is None:
        raise ValueError("custom_generate=sjd2: needs input_ids, the prompts as the processor wrote them")

    def setting(name: str, default: Any) -> Any:
        places = (others, vars(generation_config) if generation_config else {}, vars(model.generation_config))
        return next((place[name] for place in places if place.get(name) is not None), default)

    backbone = _backbone(model)
    backbone.rows = _unpadded(token_ids, others.get("attention_mask"))
    scale = float(setting("guidance_scale", 1.0))
    if scale != 1 and negative_prompt_ids is None:
        raise ValueError(f"guidance_scale={scale}: needs negative_prompt_ids, the empty side of guidance")
    if negative_prompt_ids is not None:
        backbone.empty_rows = _unpadded(negative_prompt_ids, negative_prompt_attention_mask)
    sampling = Sampling(
        temperature=float(setting("temperature", 1.0)) if setting("do_sample", False) else 0.0,
        top_k=int(setting("top_k", 0)),
        top_p=float(setting("top_p", 1.0)),
        guidance_scale=scale,
    )
    method = DecodingConfig(
        "sjd2", window=window, num_levels=num_levels, noise=NoiseProcess(**(noise or {})), sampling=sampling
    )
    if isinstance(backbone, GlmImageBackbone) and others.get("image_grid_thw") is not None:
        backbone.tokens = replace(backbone.tokens, draft_side=_draft_side(others["image_grid_thw"]))
    size = image_size or _size_of(backbone, others.get("image_grid_thw"))
    names = [str(row) for row in range(len(token_ids))]
    output = decode(backbone, names, _seeds(seed, len(names)), method, backbone.layout(*size))
    drawn = backbone.slot_token_ids[output.slot_ids.to(backbone.slot_token_ids.device)]
    end = [backbone.tokens.newline] if backbone.NEWLINE else []
    end += getattr(backbone.tokens, "closing", ())
    behind = torch.tensor(end, dtype=torch.long, device=token_ids.device).expand(len(names), -1)
    sequences = torch.cat([token_ids, drawn.to(token_ids.device), behind], dim=1)
    as_object = setting("return_dict_in_generate", False)
    return GenerateDecoderOnlyOutput(sequences=sequences) if as_object else sequences


def _backbone(model: Any) -> Any:
    """The model in its family's adapter, kept with the model: what was compiled is found again."""
    kept = vars(model).get("_sjd2_backbone")
    if kept is None:
        kind = getattr(model.config, "model_type", "")
        no_words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))
        if kind == "chameleon":
            kept = _Chameleon(model, no_words, _CodesOnly(model.config), LUMINA_MGPT)
        elif kind == "emu3":
            kept = _Emu3(model, no_words, Emu3Tokens())
        elif kind == "glm_image":
            kept = _GlmImage(model, no_words, GlmImageTokens())
        else:
            raise ValueError(f"custom_generate=sjd2: is for chameleon, emu3 and glm_image, not for {kind!r}")
        vars(model)["_sjd2_backbone"] = kept  # no submodule: it holds the model itself
    return kept.eval()


def _size_of(backbone: VocabularyBackbone, grids: Tensor | None) -> tuple[int, int]:
    """(height, width) in pixels, as the prompt says it."""
    if isinstance(backbone, ChameleonBackbone):
        t, rows = backbone.tokens, {tuple(row[-3:]) for row in backbone.rows}
        (boi, height, width), *further = rows
        if boi == t.boi and min(height, width) > t.size_base and not further:
            return (height - t.size_base) * t.size_unit, (width - t.size_base) * t.size_unit
        raise ValueError(
            "input_ids: must end in the start of an image and its two size tokens, one size for all"
        )
    if isinstance(backbone, GlmImageBackbone) and grids is not None:
        height, width = max(grids.tolist())[1:]
        step = backbone.image_tokenizer.downsample
        return height * step, width * step
    raise ValueError("image_size: give (height, width) in pixels; these arguments do not say it")


def _draft_side(grids: Tensor) -> int:
    """Side of a square image's draft, of which the draft among these grids (N, 3) is another shape."""
    (_, *draft), *_, (_, *image) = sorted(grids.tolist())
    found = (side for side in range(1, max(draft) ** 2 + 1) if draft_of(*image, side) == tuple(draft))
    side = next(found, None)
    if side is None:
        raise ValueError(f"image_grid_thw: {draft} is no draft of an image of {image} codes")
    return side


def _unpadded(token_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    kept = torch.ones_like(token_ids) if mask is None else mask
    return [row[keep.bool()].tolist() for row, keep in zip(token_ids, kept, strict=True)]


def _seeds(seed: int | Sequence[int] | None, num: int) -> list[int]:
    if seed is None:
        return torch.randint(2**31, (num,)).tolist()
    return list(range(seed, seed + num)) if isinstance(seed, int) else list(seed)
