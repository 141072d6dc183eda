"""What is asked for becomes the method and the size that were meant, or a sentence on what is wrong."""

from dataclasses import replace

import pytest

from sjd2_lightning.decoding import Sampling
from sjd2_lightning.evaluation.prompts import seed_of
from sjd2_lightning.playground.offer import MOST_PROMPTS, Offer, Wish, several, single
from tests.tools.small_evaluation import METHODS, SIDE, small_backbone

WISH = Wish(f"{SIDE} x {SIDE}", 3, 0.5, 2.0)


@pytest.fixture(scope="module")
def offer() -> Offer:
    return Offer(small_backbone(), "small", METHODS, "sjd2", (SIDE, SIDE), ["red cat"])


def test_sampling_is_one_for_all_and_window_and_levels_the_method_s(offer):
    sampling = Sampling(temperature=0.5, guidance_scale=2.0)
    assert offer.method("ar", WISH, 9, 9) == replace(METHODS["ar"], sampling=sampling)
    assert offer.method("sjd2", WISH) == replace(METHODS["sjd2"], sampling=sampling)
    wished = offer.method("sjd2", WISH, 4, 3)
    assert wished == replace(METHODS["sjd2"], sampling=sampling, window=4, num_levels=3)
    assert offer.method("sjd", WISH, 4, 3).num_levels == 0, "a method without noise has no levels"


def test_a_value_that_no_method_can_have_is_named(offer):
    with pytest.raises(ValueError, match=r"decoding.sampling.temperature=-1"):
        offer.method("sjd2", replace(WISH, temperature=-1.0))
    with pytest.raises(ValueError, match=r"decoding.window=0"):
        offer.method("sjd2", WISH, window=0)


def test_sizes_are_those_that_the_model_draws(offer):
    assert offer.sizes() == ["8 x 8", "6 x 12", "12 x 6"]
    assert offer.layout(replace(WISH, size=" 6x12 ")).pixels == (6, 12)
    with pytest.raises(ValueError, match="write height x width in pixels, such as 8 x 8"):
        offer.layout(replace(WISH, size="large"))
    with pytest.raises(ValueError, match="must be a positive multiple"):
        offer.layout(replace(WISH, size="7 x 8"))


def test_prompts_are_lines_with_a_seed_each():
    items = several("  red cat\n\nblue dog \n", 5)
    assert [item.prompt for item in items] == ["red cat", "blue dog"]
    assert [item.seed for item in items] == [seed_of("prompt-00000", 5), seed_of("prompt-00001", 5)]
    for text in (" \n", "a\n" * (MOST_PROMPTS + 1)):
        with pytest.raises(ValueError, match=f"Give 1 to {MOST_PROMPTS} prompts"):
            several(text, 0)


def test_the_seed_of_one_prompt_is_its_own():
    assert single(" red cat ", 7).seed == 7, "decode(..., [7], ...) draws the same image"
    with pytest.raises(ValueError, match="at least one word"):
        single("  ", 7)
    with pytest.raises(ValueError, match="seed -1"):
        single("red", -1)
