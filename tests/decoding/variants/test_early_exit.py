"""Early exit: a cap of one is one pass, one that is never reached is exact, and what stands is committed."""

import pytest
import torch
from torch.testing import assert_close

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.models.policy import ActionPolicy, PolicySizes
from sjd2_lightning.training.states import TeacherForced, logits_of

SIZES = PolicySizes(num_bins=12, num_steps=4, num_dims=3, num_numbers=5, width=16, num_layers=2, head_width=8)
TEXTS = ["0 1 2 3 4", "11 3 3 0 7", "5 5 5 5 5", "9 0 2 8 1"]
N = 12


def policy() -> ActionPolicy:
    """A policy whose laws are far from uniform."""
    torch.manual_seed(0)
    made = ActionPolicy(SIZES).eval()
    for weight in made.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    return made


def method(**values) -> DecodingConfig:
    greedy = {"method": "jacobi", "window": N, "acceptance": "match", "sampling": Sampling(0.0)}
    return DecodingConfig(**{**greedy, **values})


def drawn(observer=None, texts=TEXTS, **values):
    model = policy()
    return decode(model, texts, list(range(len(texts))), method(**values), model.chunk, observer)


def seen_of(**values):
    passes = []
    drawn(passes.append, **values)
    return passes


@pytest.mark.parametrize("acceptance", ["match", "replay"])
def test_greedy_jacobi_is_plain_decoding(acceptance):
    plain, jacobi = drawn(method="ar", window=1), drawn(acceptance=acceptance)
    assert torch.equal(plain.slot_ids, jacobi.slot_ids)
    assert plain.stats.nfe.tolist() == [N] * 4
    assert jacobi.stats.nfe.max() < N


@pytest.mark.parametrize("cap", [N, N + 5])
def test_a_cap_that_is_never_reached_is_exact(cap):
    capped, jacobi = drawn(max_passes=cap), drawn()
    assert torch.equal(capped.slot_ids, jacobi.slot_ids)
    assert_close(capped.stats.committed, jacobi.stats.committed)


@pytest.mark.parametrize("acceptance", ["match", "replay"])
@pytest.mark.parametrize("cap", [1, 2, 3])
def test_a_cap_takes_what_so_many_passes_over_all_codes_give(cap, acceptance):
    """By the policy's plain forward: codes of the whole chunk, replaced by the likeliest ones `cap` times."""
    model = policy()
    found = drawn(max_passes=cap, acceptance=acceptance)
    codes = seen_of(max_passes=cap)[0].drafts[:, :N]
    numbers = [[int(word) for word in text.split()] for text in TEXTS]
    with torch.no_grad():
        for _ in range(cap):
            sample = TeacherForced(numbers, codes.view(-1, 4, 3), model.chunk)
            codes = logits_of(model, sample, None).argmax(-1)
    assert torch.equal(found.slot_ids, codes)
    assert found.stats.nfe.tolist() == [cap] * 4
    assert found.stats.num_generated.tolist() == [N] * 4
    assert not torch.equal(found.slot_ids, drawn().slot_ids), "the cap is reached"


def test_an_image_ends_at_the_first_pass_that_changes_few_drafts():
    most = 3
    found, passes = drawn(max_changed=most), seen_of(max_changed=most)
    for row in range(4):
        changes = [
            int(((p.tokens != p.drafts)[place] & (int(p.heads[place]) + torch.arange(N) < N)).sum())
            for p in passes
            for place in (p.rows == row).nonzero().flatten().tolist()
            if p.heads[place] < N
        ]
        assert len(changes) == found.stats.nfe[row]
        assert changes[-1] <= most
        assert min(changes[:-1]) > most
    assert (found.stats.nfe < drawn().stats.nfe).any()


def test_a_row_does_not_depend_on_its_batch():
    for values in ({"max_passes": 3}, {"max_changed": 2}):
        together = drawn(**values)
        alone = decode(policy(), TEXTS[2:3], [2], method(**values), policy().chunk)
        assert torch.equal(together.slot_ids[2], alone.slot_ids[0])


def test_an_early_exit_is_lossy_and_is_refused_where_it_means_nothing():
    assert not method(max_passes=6).lossless
    assert not method(max_changed=1).lossless
    assert method().lossless
    with pytest.raises(ValueError, match=r"decoding\.max_passes=3: set it to 0 with method=ar"):
        drawn(max_passes=3, method="ar", window=1)
    with pytest.raises(ValueError, match=r"must hold all 12 slots.*set decoding\.window=12"):
        drawn(max_passes=3, window=8)
