"""GLM-Image: codes by its own encoder, positions as transformers counts them, pixels by diffusers."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
)
from torch.nn import functional as F
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
from transformers.models.glm_image.image_processing_glm_image import GlmImageImageProcessor

from sjd2_lightning.__main__ import main
from sjd2_lightning.decoding import DecodingConfig, decode
from sjd2_lightning.models.backbone import position_ids
from sjd2_lightning.models.glm_image import GlmImageBackbone, draft_of
from sjd2_lightning.models.glm_pixels import draw_pixels, load_pixels
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.models.registry import build_shrunken


@pytest.fixture(scope="module")
def backbone() -> GlmImageBackbone:
    return build_shrunken("glm_image")


def shrunken_pipeline(backbone) -> GlmImagePipeline:
    """The diffusion stage with the release's parts, small and random."""
    torch.manual_seed(1)
    text = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=None,
        text_encoder=T5EncoderModel(text).eval(),
        vision_language_encoder=None,
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).eval(),
        transformer=GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=backbone.num_codes,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )


def test_the_published_sequence(backbone):
    layout = backbone.layout(1024, 768)
    assert layout.grids == (draft_of(32, 24, 2), (32, 24))
    drafts = [draft_of(*grid) for grid in ((32, 32), (36, 24), (64, 64), (28, 40))]
    assert drafts == [(16, 16), (19, 13), (16, 16), (13, 19)], "the processor of transformers says the same"
    letters = backbone.text_tokenizer.encode
    sizes = [167845, *letters("32 24"), 167846, 167845, *letters("2 1"), 167846]
    assert backbone.prompt_ids("a cat", layout) == [*letters("a cat"), *sizes, 16384]
    assert backbone.unconditional_ids(layout) == [*sizes, 16384]
    assert backbone.slot_token_ids.tolist() == list(range(16384))
    assert backbone.model.lm_head.out_features == 16512


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 32)])
def test_positions_are_those_of_transformers(backbone, size):
    layout = backbone.layout(*size)
    ids = torch.tensor([backbone.prompt_ids("a cat", layout)])
    grids = torch.tensor([[1, *grid] for grid in layout.grids[::-1]])
    text, _ = backbone.model.model.get_rope_index(ids, grids, torch.tensor([2]))
    drawn = backbone.model.model._cached_decode_position_ids[0, :, None, : layout.num_slots]
    length = ids.shape[1]
    slots = torch.arange(-length, layout.num_slots)[None]
    ours = position_ids(slots, torch.tensor([length]), layout.distances(layout.num_slots + 3)[None])
    assert torch.equal(ours, torch.cat([text, drawn], dim=-1))


def test_codes_of_a_picture_are_those_of_the_processor_and_the_encoder(backbone):
    """The release's processor: pictures are halved, patches of 16 pixels, none merged."""
    pixels = torch.randint(
        0, 256, (3, 512, 768), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    pixels = F.avg_pool2d(pixels[None].float(), 8).repeat_interleave(8, 2).repeat_interleave(8, 3).byte()
    processor = GlmImageImageProcessor(
        patch_size=16, temporal_patch_size=1, merge_size=1, min_pixels=512 * 512, max_pixels=2048 * 2048
    )
    seen = processor(images=pixels[0], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 16, 24]]
    features = backbone.model.model.get_image_features(seen["pixel_values"], seen["image_grid_thw"])
    wanted = backbone.model.model.get_image_tokens(features.pooler_output)
    codes = backbone.image_tokenizer.encode(pixels / 255)
    draft = draft_of(16, 24, 2)
    assert codes.shape == (1, 1, draft[0] * draft[1] + 16 * 24)
    ours = codes[0, 0, draft[0] * draft[1] :]
    assert (ours == wanted).float().mean() > 0.9, "but for a step of 1 / 256 of some pixels"
    assert (ours == wanted.roll(1)).float().mean() < 0.5
    with pytest.raises(ValueError, match="images of 760x512 pixels: must be multiples of 32"):
        backbone.image_tokenizer.encode(pixels[..., :760] / 255)


def test_codes_as_colours(backbone):
    layout = backbone.layout(64, 96)
    codes = torch.arange(layout.num_slots).view(1, 1, -1)
    image = backbone.decode_images(codes, layout)
    assert image.shape == (1, 3, 64, 96)
    assert len(image[0].flatten(1).unique(dim=1).T) == 6, "a colour a code of the image, none of the draft"
    long = backbone.layout(32, 96)
    with pytest.raises(ValueError, match="give the grid"):
        backbone.decode_images(torch.zeros(1, 1, long.num_slots, dtype=torch.long))
    square = backbone.layout(64, 64)
    codes = torch.arange(square.num_slots).view(1, 1, -1)
    assert torch.equal(backbone.decode_images(codes), backbone.decode_images(codes, square))


def test_pixels_are_drawn_by_diffusers_from_codes_that_were_drawn_here(backbone, tmp_path):
    layout = backbone.layout(64, 96)
    shrunken_pipeline(backbone).save_pretrained(tmp_path)
    pipeline = load_pixels(tmp_path, torch.float32)
    prompts = ["a cat", 'a sign that says "hello"']
    codes = decode(backbone, prompts, [0, 1], DecodingConfig("ar", window=1), layout).image_ids
    images = draw_pixels(pipeline, codes, layout, prompts, [0, 1], num_steps=2)
    assert images.shape == (2, 3, 64, 96)
    assert to_uint8(images).float().std() > 0
    assert torch.equal(draw_pixels(pipeline, codes[1:], layout, prompts[1:], [1], num_steps=2), images[1:])
    other = codes.clone()
    other[..., 0] = (other[..., 0] + 1) % backbone.num_codes
    assert torch.equal(draw_pixels(pipeline, other, layout, prompts, [0, 1], num_steps=2), images)
    other[..., -1] = (other[..., -1] + 1) % backbone.num_codes
    changed = draw_pixels(pipeline, other, layout, prompts, [0, 1], num_steps=2)
    assert not torch.equal(changed, images), "codes of the image count, those of the draft do not"
    with pytest.raises(
        ValueError, match=r"no diffusion stage of GLM-Image in .*hf download zai-org/GLM-Image"
    ):
        load_pixels(tmp_path / "gone")


def test_the_command_line_draws_with_the_diffusion_stage(backbone, tmp_path, capsys):
    shrunken_pipeline(backbone).save_pretrained(tmp_path / "stage")
    words = [
        "a cat",
        "--out",
        str(tmp_path / "out"),
        "model=glm_image",
        "model.init=random_tiny",
        "device=cpu",
    ]
    words += ["weights=model", "decoding.window=4", "model.image_size=[64,64]", "model.dtype=float32"]
    main(["generate", *words])
    assert "its pixels" not in capsys.readouterr().out
    colours = (tmp_path / "out" / "0-a-cat-0-sjd2.png").read_bytes()
    main(["generate", *words, f"model.pixels={tmp_path / 'stage'}"])
    assert ", its pixels " in capsys.readouterr().out
    assert (tmp_path / "out" / "0-a-cat-0-sjd2.png").read_bytes() != colours
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a cat", f"model.pixels={tmp_path / 'stage'}"])
    assert "has an image decoder of its own" in str(stopped.value) + capsys.readouterr().err


def test_a_release_in_the_layout_of_diffusers_loads(backbone, tmp_path):
    from sjd2_lightning.models.registry import load_backbone

    backbone.save(tmp_path / "saved")
    (tmp_path / "saved" / "trunk").rename(tmp_path / "vision_language_encoder")
    (tmp_path / "saved" / "text").rename(tmp_path / "processor")
    loaded = load_backbone("glm_image", tmp_path)
    assert loaded.tokens.draft_side == 16
    layout = loaded.layout(1024, 1024)
    assert layout.grids == ((16, 16), (32, 32))
    assert layout.num_slots == 256 + 1024 == GlmImageBackbone.num_slots(32, 32)
    assert torch.equal(loaded.slot_table(), backbone.slot_table())
