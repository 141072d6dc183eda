"""Numbers that are not finite end a decoding with their cause, in every method and sampling."""

from dataclasses import replace

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode, decode_reference
from sjd2_lightning.decoding.config import Grouping, TreeShape
from tests.tools.tiny_backbones import RAGGED_PROMPTS, TableBackbone, strong_table, tiny_chameleon

PIXELS = (6, 4)
METHODS = {
    "ar": DecodingConfig("ar", window=1),
    "jacobi": DecodingConfig("jacobi", 5, acceptance="match"),
    "sjd": DecodingConfig("sjd", 5, acceptance="exact", refiner="resample", draft_init="repeat_left"),
    "sjd_pp": DecodingConfig("sjd_pp", 5, acceptance="exact", refiner="reuse"),
    "gumbel": DecodingConfig("gumbel", 5, draft_init="gumbel"),
    "tree": DecodingConfig("sjd_pac", 5, acceptance="exact", tree=TreeShape(3, 2, 2)),
    "tree-replay": DecodingConfig("sjd2", 5, 2, tree=TreeShape(3, 2, 2)),
    "sjd2": DecodingConfig("sjd2", 5, 3, level_rule="confident"),
    "paper": DecodingConfig("sjd2", 5, 2, acceptance="paper", refiner="keep"),
    "pure": DecodingConfig("sjd2_pure", 5, 2, acceptance="pure"),
    "gsd": DecodingConfig("gsd", 5, acceptance="grouped", groups=Grouping(3)),
}
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0),
    Sampling(0.7, top_k=3, top_p=0.9, guidance_scale=3.0),
    Sampling(guidance_scale=3.0, guidance_schedule="linear"),
)


def hurt(change):
    """A backbone of 7 codes, one of whose weights was changed."""
    backbone = tiny_chameleon(7, seed=3)
    with torch.no_grad():
        change(dict(backbone.named_parameters()))
    return backbone


def one_nan(weights):
    weights["model.model.layers.1.mlp.down_proj.weight"][3, 2] = torch.nan


@pytest.fixture(scope="module")
def nan_backbone():
    return hurt(one_nan)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "cut", "linear"])
@pytest.mark.parametrize("name", METHODS)
def test_one_weight_that_is_nan_is_named(nan_backbone, name, sampling):
    config, layout = replace(METHODS[name], sampling=sampling), nan_backbone.layout(*PIXELS)
    wanted = rf"slot 0 of image 0 of 4 that {config.method} draws in float32: the weight \S*down_proj\.weight"
    with pytest.raises(ValueError, match=wanted):
        decode(nan_backbone, RAGGED_PROMPTS, range(4), config, layout)


def test_the_slow_reference_refuses_it_too(nan_backbone):
    for sampling in SAMPLINGS:
        with pytest.raises(ValueError, match=r"at slot 0 of the image, in float32: the weight \S*down_proj"):
            decode_reference(nan_backbone, "red cat", 0, sampling, nan_backbone.layout(*PIXELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_overflow_is_told_from_a_broken_weight(dtype):
    factor = torch.finfo(dtype).max / 4

    def huge(weights):
        weights["model.lm_head.weight"].mul_(factor)

    backbone = hurt(huge)
    backbone.model.to(dtype)
    assert all(bool(value.isfinite().all()) for value in backbone.parameters())
    with pytest.raises(ValueError, match=r"weights are finite, so numbers overflow.*dtype=bfloat16") as found:
        decode(backbone, ["red cat"], [0], METHODS["sjd2"], backbone.layout(*PIXELS))
    assert str(dtype).removeprefix("torch.") in str(found.value)


def chain(num_codes: int = 4) -> TableBackbone:
    """After the prompt code 0, and k + 1 after k, whatever the prompt."""
    logits = torch.full((2, num_codes + 2, num_codes + 2, num_codes), -30.0)
    for last in range(num_codes - 1):
        logits[:, :, last, last + 1] = 30.0
    logits[:, :, num_codes - 1 :, 0] = 30.0
    return TableBackbone(logits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_image_and_slot_are_named(value):
    backbone = chain()
    backbone.table[1, :, 2] = value  # of the second prompt, behind code 2
    assert decode(backbone, ["p0"], [0], METHODS["ar"], backbone.layout(1, 4)).image_ids.tolist() == [
        [[0, 1, 2, 3]]
    ]
    with pytest.raises(ValueError, match="at slot 3 of image 1 of 2 that ar draws"):
        decode(backbone, ["p0", "p1"], [0, 1], METHODS["ar"], backbone.layout(1, 4))


def test_laws_behind_branches_count():
    """The first token is 1 for sure, and behind it is no law: only a branch reads it where drafts differ."""
    backbone = strong_table(3)
    backbone.table[:, 4, 4] = torch.tensor([-30.0, 30.0, -30.0])
    backbone.table[:, :, 1] = torch.nan
    for seed in range(8):
        with pytest.raises(ValueError, match="at slot 1 of image 0"):
            decode(backbone, ["p1"], [seed], METHODS["tree"], backbone.layout(1, 4))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "cut", "linear"])
@pytest.mark.parametrize("name", ["ar", "gumbel", "sjd2", "tree-replay"])
def test_a_banned_code_is_no_error(name, sampling):
    backbone = strong_table(5)
    backbone.table[..., 2] = -torch.inf
    layout = backbone.layout(3, 3)
    ids = decode(backbone, ["p1"], [4], replace(METHODS[name], sampling=sampling), layout)
    assert not (ids.image_ids == 2).any()
    assert torch.equal(ids.slot_ids[0], decode_reference(backbone, "p1", 4, sampling, layout))


def test_where_all_codes_are_banned_there_is_no_law():
    backbone = strong_table(5)
    backbone.table[..., 3] = 40.0
    backbone.table[:, :, 3] = -torch.inf
    with pytest.raises(ValueError, match="at slot 1 of image 0"):
        decode(backbone, ["p1"], [4], METHODS["ar"], backbone.layout(1, 3))


@pytest.mark.parametrize("name", METHODS)
def test_a_structural_slot_needs_no_law(name):
    backbone = strong_table(3)
    backbone.table[:, 4, :3] = (
        torch.nan
    )  # behind the first code: of the newline alone where rows have one code
    assert decode(backbone, ["p1"], [0], METHODS[name], backbone.layout(3, 1)).image_ids.shape == (1, 3, 1)
