"""FLOPs of decoding: equal to torch's counter on the whole decoding, less its prefill."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sjd2_lightning.decoding import decode
from sjd2_lightning.decoding.config import DecodingConfig
from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.evaluation.flops import pass_flops
from tests.tools.small_evaluation import METHODS, PROMPTS, SIDE, evaluate, small_backbone

GUIDED = Sampling(guidance_scale=2.0)


class Enough(Exception):
    pass


def counted(backbone, config, item, stop_after=None):
    """Operations of decoding one prompt, or of its prefill and first passes."""
    passes = []

    def observer(iteration):
        passes.append(iteration)
        if len(passes) == stop_after:
            raise Enough

    layout = backbone.layout(SIDE, SIDE)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, contextlib.suppress(Enough):
        decode(backbone, [item.prompt], [item.seed], config, layout, observer)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "config",
    [
        METHODS["ar"],
        METHODS["sjd2"],
        DecodingConfig("ar", window=1, sampling=GUIDED),
        DecodingConfig("sjd", window=6, sampling=GUIDED),
    ],
    ids=["ar", "sjd2", "guided ar", "guided sjd"],
)
def test_operations_are_those_of_the_passes(tmp_path, config):
    backbone, item = small_backbone(), PROMPTS[1]
    result = evaluate(tmp_path, backbone, [item], methods={"x": config}, batch_size=1)
    record = result.methods["x"].records[0]
    first = counted(backbone, config, item, 1)
    tokens, copies = config.window, 1 if config.sampling.guidance_scale == 1 else 2
    prompt = len(backbone.prompt_ids(item.prompt, backbone.layout(SIDE, SIDE)))
    one_pass = pass_flops(backbone, tokens, config.num_levels + prompt - 1 + tokens, copies)
    passes = counted(backbone, config, item) - first + one_pass
    found = result.methods["x"].measured["flops_per_token"]
    # What else multiplies matrices in the loop (nearest codes and the like) is not counted: well below 5 %.
    assert found.value * record.num_generated == pytest.approx(passes, rel=0.05)


def test_more_columns_and_copies_cost_more():
    backbone = small_backbone()
    least = pass_flops(backbone, 1, 8)
    assert pass_flops(backbone, 1, 16) > least
    assert pass_flops(backbone, 1, 8, copies=2) == 2 * least
    assert pass_flops(backbone, 4, 8) == 4 * least
