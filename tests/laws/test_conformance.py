"""Every family passes the conformance suite; what is particular to one is checked beside it."""

from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding import Sampling, decode
from sjd2_lightning.models.backbone import ImageLayout
from sjd2_lightning.models.registry import FAMILIES, build_shrunken
from tests.tools.conformance import AR, CHECKS, PROMPTS, Case, image_token_ids
from tests.tools.plain_llamagen import plain_llamagen
from tests.tools.tiny_backbones import tiny_chameleon


def guided_argmax(rows: list[Tensor], scale: float) -> int:
    """The likeliest code under guidance; rows are conditional and unconditional logits (K,)."""
    return int((rows[1] + scale * (rows[0] - rows[1])).argmax())


def token_loop(backbone, logits_of):
    """Greedy decoding by ids without cache; `logits_of` is transformers' path from ids to code logits."""

    def draw(prompt: str, layout: ImageLayout, scale: float) -> Tensor:
        prompt_ids = backbone.prompt_ids(prompt, layout)
        contexts = [prompt_ids, backbone.unconditional_ids(layout, prompt_ids)]
        slots: list[int] = []
        for forced in layout.forced:
            if forced >= 0:
                slots.append(forced)
                continue
            rows = [logits_of(ids, slots)[-1] for ids in contexts]
            slots.append(guided_argmax(rows, scale))
        return layout.image_ids(torch.tensor([slots]))[0]

    return draw


def vocabulary_case(backbone, logits_of_ids, sizes, refused, greedy=None) -> Case:
    """A case whose codes are token ids; `logits_of_ids` maps ids to logits of the whole vocabulary (L, V)."""
    codes = backbone.slot_token_ids[: backbone.num_codes]

    def logits_of(prompt_ids: list[int], slots: list[int]) -> Tensor:
        ids = torch.tensor([[*prompt_ids, *backbone.slot_token_ids[slots].tolist()]])
        return logits_of_ids(ids)[:, codes]

    def teacher(prompt_ids: list[int], image_ids: Tensor, layout: ImageLayout) -> Tensor:
        slots = layout.slot_ids(image_ids)[0].tolist()
        return logits_of(prompt_ids, slots)[len(prompt_ids) - 1 + layout.code_slots]

    greedy = greedy or token_loop(backbone, logits_of)
    return Case(backbone, sizes, refused, backbone.NEWLINE, teacher, greedy)


def chameleon_case(backbone, sizes, refused) -> Case:
    """`forward` of the class masks image logits: trunk and head are called apart, over ids."""

    def logits_of_ids(ids: Tensor) -> Tensor:
        return backbone.model.lm_head(
            backbone.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        )

    return vocabulary_case(backbone, logits_of_ids, sizes, refused)


def generate_case(backbone, sizes, refused) -> Case:
    """`generate` with the published constraint: codes within rows, then the end of a line, if any."""

    def greedy(prompt: str, layout: ImageLayout, scale: float) -> Tensor:
        prompt_ids = backbone.prompt_ids(prompt, layout)
        empty = backbone.unconditional_ids(layout, prompt_ids)
        codes = backbone.slot_token_ids[: backbone.num_codes].tolist()
        allowed = [codes, backbone.slot_token_ids[backbone.num_codes :].tolist()]
        ids = torch.tensor([prompt_ids])
        drawn = backbone.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=layout.num_slots,
            guidance_scale=scale,
            negative_prompt_ids=torch.tensor([empty]),
            prefix_allowed_tokens_fn=lambda _, ids: allowed[layout.forced[len(ids) - len(prompt_ids)] >= 0],
        )[0, len(prompt_ids) :]
        return layout.image_ids(drawn[None] - backbone.slot_token_ids[0])[0]

    def logits_of_ids(ids: Tensor) -> Tensor:
        return backbone.model(input_ids=ids, use_cache=False).logits[0]

    return vocabulary_case(backbone, logits_of_ids, sizes, refused, greedy)


def janus_case(backbone) -> Case:
    """Codes are fed by `prepare_embeddings_for_image_generation` and read by `generation_head`."""
    model = backbone.model

    def logits_of(prompt_ids: list[int], codes: list[int]) -> Tensor:
        parts = [model.get_input_embeddings()(torch.tensor([prompt_ids]))]
        if codes:
            parts.append(model.prepare_embeddings_for_image_generation(torch.tensor([codes])))
        hidden = model.model.language_model(inputs_embeds=torch.cat(parts, dim=1), use_cache=False)
        return model.model.generation_head(hidden.last_hidden_state[0])

    def teacher(prompt_ids: list[int], image_ids: Tensor, layout: ImageLayout) -> Tensor:
        codes = image_ids.flatten().tolist()
        return logits_of(prompt_ids, codes[:-1])[len(prompt_ids) - 1 :]

    return Case(backbone, [(64, 64)], [(64, 32), (384, 384)], False, teacher, token_loop(backbone, logits_of))


def glm_image_case(backbone) -> Case:
    """`generate` as diffusers' pipeline calls it; with guidance, which it lacks, the same trunk over ids."""
    model, num_codes = backbone.model, backbone.num_codes

    def grids_of(layout: ImageLayout) -> Tensor:
        return torch.tensor([[1, *grid] for grid in layout.grids[::-1]])

    def logits_of(layout: ImageLayout, prompt_ids: list[int], codes: list[int]) -> Tensor:
        ids = torch.tensor([prompt_ids])
        text, _ = model.model.get_rope_index(
            ids, image_grid_thw=grids_of(layout), images_per_sample=torch.tensor([2])
        )
        drawn = model.model._cached_decode_position_ids[0, :, None, : len(codes)]
        hidden = model.model.language_model(
            input_ids=torch.tensor([prompt_ids + codes]),
            position_ids=torch.cat([text, drawn], dim=-1),
            use_cache=False,
        )
        return model.lm_head(hidden.last_hidden_state[0])[:, :num_codes]

    def teacher(prompt_ids: list[int], image_ids: Tensor, layout: ImageLayout) -> Tensor:
        return logits_of(layout, prompt_ids, image_ids.flatten().tolist()[:-1])[len(prompt_ids) - 1 :]

    def greedy(prompt: str, layout: ImageLayout, scale: float) -> Tensor:
        if scale != 1:
            return token_loop(backbone, partial(logits_of, layout))(prompt, layout, scale)
        ids = torch.tensor([backbone.prompt_ids(prompt, layout)])
        drawn = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            image_grid_thw=grids_of(layout),
            images_per_sample=torch.tensor([2]),
            do_sample=False,
            max_new_tokens=layout.num_slots,
            prefix_allowed_tokens_fn=lambda *_: list(range(num_codes)),
        )[0, ids.shape[1] :]
        return drawn[None]

    return Case(
        backbone, [(64, 96), (32, 32), (96, 64)], [(0, 32), (48, 32), (32, 512)], False, teacher, greedy
    )


def llamagen_case(backbone) -> Case:
    """The release written out, without cache, mask or positions of ours."""

    def teacher(prompt_ids: list[int], image_ids: Tensor, layout: ImageLayout) -> Tensor:
        codes = image_ids.flatten().tolist()
        return plain_llamagen(backbone, prompt_ids, codes[:-1])[len(prompt_ids) - 1 :]

    draw = token_loop(backbone, partial(plain_llamagen, backbone))
    return Case(backbone, [(64, 64)], [(64, 32), (128, 128)], False, teacher, draw)


@cache
def case_of(name: str) -> Case:
    """Each backbone is built once."""
    if name == "tiny":
        return chameleon_case(tiny_chameleon(12, scale=0.5), [(6, 4), (2, 2), (4, 8)], [(5, 4), (0, 2)])
    backbone = build_shrunken(name).requires_grad_(True)
    for part in backbone.UNTRAINED:
        backbone.model.get_submodule(part).requires_grad_(False)
    if name == "chameleon":
        return chameleon_case(backbone, [(32, 64), (32, 32), (96, 32)], [(40, 64), (-32, 32)])
    if name == "emu3":
        return generate_case(backbone, [(16, 24), (8, 8), (24, 16)], [(0, 8), (20, 16)])
    if name == "simple_ar":
        return generate_case(backbone, [(48, 48), (16, 16), (32, 32)], [(48, 32), (0, 0), (40, 40)])
    return {"janus": janus_case, "glm_image": glm_image_case, "llamagen": llamagen_case}[name](backbone)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_conformance(name, check):
    if check.__name__ in ("check_loss", "check_modes", "check_folder"):
        check(case_of(name))
    else:
        with torch.no_grad():
            check(case_of(name))


@pytest.mark.parametrize("name", ["tiny", "chameleon"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_chameleon_draws_what_generate_draws(name, scale):
    """`generate` with its cache and guidance, once its mask of all image logits is taken off."""
    case = case_of(name)
    backbone, layout = case.backbone, case.small
    prompt_ids = backbone.prompt_ids(PROMPTS[0], layout)
    ids = torch.tensor([prompt_ids])
    allowed = [backbone.slot_token_ids[:-1].tolist(), [backbone.tokens.newline]]
    with patch.dict(vars(backbone.model.model.vocabulary_mapping), {"image_tokens": []}):
        drawn = backbone.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=layout.num_slots,
            guidance_scale=scale,
            negative_prompt_ids=torch.tensor([backbone.unconditional_ids(layout, prompt_ids)]),
            prefix_allowed_tokens_fn=lambda _, ids: allowed[layout.forced[len(ids) - len(prompt_ids)] >= 0],
            pad_token_id=0,
        )[0, len(prompt_ids) :]
    assert len(drawn) == layout.num_slots
    sampling = Sampling(temperature=0.0, guidance_scale=scale)
    ours = decode(backbone, PROMPTS[:1], [0], replace(AR, sampling=sampling), layout).slot_ids[0]
    assert backbone.slot_token_ids[ours].tolist() == drawn.tolist()


def test_janus_draws_what_generate_draws():
    """Transformers pads the prompt's ids itself: the unconditional context is the published one."""
    backbone = case_of("janus").backbone
    layout = case_of("janus").small
    ids = torch.tensor([backbone.prompt_ids(PROMPTS[0], layout)])
    drawn = backbone.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        do_sample=False,
        guidance_scale=3,
        use_cache=True,
    )
    assert torch.equal(
        drawn.view(layout.height, layout.width), case_of("janus").greedy(PROMPTS[0], layout, 3.0)
    )


def test_janus_feeds_the_aligned_embedding():
    backbone = case_of("janus").backbone
    codes = torch.tensor([[3, 16383]])
    wanted = backbone.model.prepare_embeddings_for_image_generation(codes)
    assert torch.allclose(F.embedding(codes, backbone.slot_table()), wanted, atol=1e-6)
    image = backbone.model.decode_image_tokens(torch.arange(16)[None])[0]
    ours = backbone.decode_images(torch.arange(16).view(1, 4, 4))[0].permute(1, 2, 0)
    assert torch.allclose(((image + 1) / 2).clamp(0, 1), ours, atol=1e-5)


def test_emu3_sequence_is_what_transformers_decodes():
    """The published sequence with its newlines and three closing tokens, taken apart by transformers."""
    case = case_of("emu3")
    codes = case.codes(case.small, batch=1)
    ids = image_token_ids(case.backbone, codes, case.small)
    assert ids[-3:] == [151847, 151853, 151850]
    assert len(ids) == 2 * (3 + 1) + 3
    image = case.backbone.model.decode_image_tokens(image_tokens=torch.tensor([ids]), height=2, width=3)
    assert torch.allclose(((image + 1) / 2).clamp(0, 1), case.backbone.decode_images(codes), atol=1e-5)
