"""Images of several sizes in one batch: each is the image that its prompt gives alone, in as many passes."""

from dataclasses import replace

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode, decode_reference
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

SIZES = [(10, 8), (4, 6), (2, 2), (6, 12)]  # pixels; the third image is one code
RULES = {
    "ar": DecodingConfig("ar", window=1),
    "sjd": DecodingConfig("sjd", 6, acceptance="exact", refiner="resample"),
    "sjd-left": DecodingConfig("sjd", 6, acceptance="exact", draft_init="repeat_left"),
    "mc_sjd-above": DecodingConfig("mc_sjd", 9, acceptance="exact", draft_init="repeat_above"),
    "gumbel": DecodingConfig("gumbel", 7, draft_init="gumbel"),
    "sjd2": DecodingConfig("sjd2", 6, 2),
    "sjd2 longer than any": DecodingConfig("sjd2", 50, 1, acceptance="exact"),
    "paper": DecodingConfig("sjd2", 6, 2, acceptance="paper", refiner="keep"),
    "pure": DecodingConfig("sjd2_pure", 6, 2, acceptance="pure"),
}
LINEAR = Sampling(guidance_scale=3.0, top_k=6, guidance_schedule="linear")  # its scales depend on the size


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(num_codes=12, hidden_size=16, seed=5, scale=0.5)


@pytest.fixture(scope="module")
def layouts(backbone):
    return [backbone.layout(*size) for size in SIZES]


def assert_alone(output, backbone, rows) -> None:
    """Every row equals a decoding of its own; rows are (prompt, seed, config, layout)."""
    for row, (prompt, seed, config, layout) in enumerate(rows):
        alone = decode(backbone, [prompt], [seed], config, layout)
        num = layout.num_slots
        assert output.slot_ids[row, :num].tolist() == alone.slot_ids[0].tolist()
        assert (output.slot_ids[row, num:] == -1).all()
        assert torch.equal(output.image_ids_by_row[row], alone.image_ids[0])
        settled = output.stats.settled_iteration[row]
        assert settled[:num].tolist() == alone.stats.settled_iteration[0].tolist()
        assert (settled[num:] == -1).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_size_does_not_depend_on_its_neighbours(backbone, layouts, rule):
    config = replace(RULES[rule], sampling=LINEAR)
    prompts, sizes = [*RAGGED_PROMPTS, *RAGGED_PROMPTS], [*layouts, *layouts[::-1]]
    seeds, left = list(range(8)), []
    output = decode(backbone, prompts, seeds, config, sizes, lambda seen: left.append(len(seen.rows)))
    assert left[0] == 8 > left[-1], "no row left early: the test would show less"
    assert_alone(output, backbone, zip(prompts, seeds, [config] * 8, sizes, strict=True))


@pytest.mark.parametrize("rule", ["ar", "sjd2", "gumbel"])
def test_replay_of_several_sizes_is_the_slow_reference(backbone, layouts, rule):
    config = replace(RULES[rule], sampling=LINEAR)
    output = decode(backbone, RAGGED_PROMPTS, range(4), config, layouts)
    for row, (prompt, layout) in enumerate(zip(RAGGED_PROMPTS, layouts, strict=True)):
        wanted = decode_reference(backbone, prompt, row, LINEAR, layout)
        assert torch.equal(output.slot_ids[row, : layout.num_slots], wanted)


def test_what_comes_out(backbone, layouts):
    output = decode(backbone, RAGGED_PROMPTS, range(4), RULES["sjd2"], layouts)
    assert [tuple(ids.shape) for ids in output.image_ids_by_row] == [(5, 4), (2, 3), (1, 1), (3, 6)]
    assert output.stats.num_generated.tolist() == [layout.num_slots for layout in layouts]
    assert torch.allclose(output.stats.step_compression, output.stats.num_generated / output.stats.nfe)
    for layout, ids in zip(layouts, output.image_ids_by_row, strict=True):
        assert backbone.decode_images(ids[None]).shape[2:] == layout.pixels
    with pytest.raises(ValueError, match="differ in size"):
        _ = output.image_ids
    same = decode(backbone, RAGGED_PROMPTS, range(4), RULES["sjd2"], [layouts[0]] * 4)
    one = decode(backbone, RAGGED_PROMPTS, range(4), RULES["sjd2"], layouts[0])
    assert torch.equal(same.image_ids, one.image_ids)
    assert torch.equal(torch.stack(one.image_ids_by_row), one.image_ids)


def test_a_layout_is_missing(backbone, layouts):
    with pytest.raises(ValueError, match="one layout for all prompts or one a prompt; got 2"):
        decode(backbone, ["red", "blue", "cat"], range(3), RULES["ar"], layouts[:2])
