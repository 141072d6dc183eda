"""No work wasted: what an iteration waits for, draws, sorts and normalises, operation by operation."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode, randomness
from sjd2_lightning.noise import NoiseProcess
from tests.tools.operations import WAITS, Operations
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

NUM_CODES = 37  # the width of nothing else
GUIDED = Sampling(guidance_scale=2.0, top_k=9)
RULES = {
    "ar": DecodingConfig("ar", window=1),
    "sjd": DecodingConfig("sjd", 6, acceptance="exact", refiner="resample"),
    "mc_sjd": DecodingConfig("mc_sjd", 6, acceptance="exact"),
    "sjd2": DecodingConfig("sjd2", 6, 2),
    "tied": DecodingConfig("sjd2", 6, 2, noise=NoiseProcess(source="tied", state="draft")),
    "stable": DecodingConfig("sjd2", 6, 3, level_rule="stable"),
    "expected": DecodingConfig("sjd2", 6, 2, noise=NoiseProcess(source="mean", estimate="expected")),
    "confident": DecodingConfig("sjd2", 6, 3, level_rule="confident", confidence=0.3),
    "sjd2_exact": DecodingConfig("sjd2", 6, 2, acceptance="exact"),
    "left": DecodingConfig("sjd", 6, acceptance="exact", draft_init="repeat_left"),
    "jacobi": DecodingConfig("jacobi", 6, acceptance="match"),
    "paper": DecodingConfig("sjd2", 6, 2, acceptance="paper", refiner="keep"),
    "pure": DecodingConfig("sjd2_pure", 6, 2, acceptance="pure"),
}


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(NUM_CODES, num_layers=1, hidden_size=8)


def watched(backbone, config) -> tuple[Operations, list[int], list[int]]:
    """Operations of a decoding, how many had run at the end of each pass, and rows of each pass."""
    operations, ends, rows = Operations(), [], []

    def observer(iteration) -> None:
        ends.append(len(operations.seen))
        rows.append(len(iteration.rows))

    with operations:
        decode(
            backbone,
            RAGGED_PROMPTS,
            range(4),
            replace(config, sampling=GUIDED),
            backbone.layout(6, 6),
            observer,
        )
    return operations, ends, rows


@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_once_an_iteration(backbone, rule, monkeypatch):
    """`tolist` of the counts is the only place where the host learns of the device, whatever the method."""
    waits = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real, name=name):
            waits.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    before = []
    operations = Operations()

    def observer(iteration) -> None:
        before.append((len(waits), len(operations.seen)))

    config = replace(RULES[rule], sampling=GUIDED)
    with operations:
        decode(backbone, RAGGED_PROMPTS, range(4), config, backbone.layout(6, 6), observer)
    assert len(before) > 3
    for (first, start), (second, end) in pairwise(before):
        assert waits[first:second] == ["tolist"]
        assert not [name for name, _ in operations.seen[start:end] if name in WAITS]


@pytest.mark.parametrize("rule", RULES)
def test_no_number_more_than_needed(backbone, rule, monkeypatch):
    """Vocabulary-wide numbers are Gumbel vectors alone, one for a slot's life; else three a slot and pass."""
    drawn = []
    real = randomness._bits

    def counted(key, count):
        drawn.append((key.numel(), count))
        return real(key, count)

    monkeypatch.setattr(randomness, "_bits", counted)
    config = RULES[rule]
    layout = backbone.layout(6, 6)
    decode(backbone, RAGGED_PROMPTS[:1], [0], config, layout)
    vectors = sum(num for num, count in drawn if count == NUM_CODES)
    if config.acceptance == "replay":
        # tied noise is made of the vectors too, before they are kept
        assert vectors == (layout.num_slots + config.window) * (2 if rule == "tied" else 1)
    else:
        assert vectors == 0
    assert {count for _, count in drawn} <= {1, 3, backbone.hidden_size, NUM_CODES}


@pytest.mark.parametrize("rule", RULES)
def test_no_sort_and_no_softmax_beyond_the_window(backbone, rule):
    operations, ends, rows = watched(backbone, RULES[rule])
    assert not operations.named("sort", "topk", "argsort", "multinomial")
    assert len(operations.named("kthvalue")) == len(ends), "top-k is a threshold"
    slots = 0
    for _, [shape, *_] in operations.named("softmax", "_softmax", "log_softmax", "_log_softmax"):
        if shape[-1] == NUM_CODES:
            slots += shape[0] * shape[1]
    if RULES[rule].acceptance == "replay" and rule not in ("expected", "confident"):
        assert slots == 0, "the largest perturbed score needs no normalisation"
    else:
        assert slots == RULES[rule].window * sum(rows), "each slot of the window once"


def test_a_wait_is_seen(backbone):
    with Operations() as operations:
        bool(torch.ones(1).any())
        torch.ones(3).nonzero()
    assert [name for name, _ in operations.named(*WAITS)] == ["_local_scalar_dense", "nonzero"]
