"""The corrector of drafts: what it changes, its file, what it is worth, and that it changes no image."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Correction, PairSweeps
from sjd2_lightning.decoding.law import guided
from sjd2_lightning.decoding.rules import Read, Scores, Slots, Verdict
from sjd2_lightning.decoding.variants.corrector import Corrected
from sjd2_lightning.models.draft_corrector import DraftCorrector, code_rows
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

AR = DecodingConfig("ar", window=1)
NUM_CODES, HIDDEN = 7, 5


def random_corrector(hidden_size: int = HIDDEN, width: int = 6, seed: int = 0) -> DraftCorrector:
    torch.manual_seed(seed)
    found = DraftCorrector(hidden_size, width)
    torch.nn.init.normal_(found.out.weight)
    return found.requires_grad_(False)


def test_a_new_one_changes_nothing():
    fresh = DraftCorrector(HIDDEN, 4)
    known = fresh.known(torch.randn(3, HIDDEN), torch.zeros(3, 4))
    assert torch.equal(fresh(F.gelu(known)), torch.zeros(3, HIDDEN))


def test_codes_are_of_one_size_and_what_is_unknown_is_zero():
    rows = code_rows(torch.randn(NUM_CODES + 2, HIDDEN), NUM_CODES)
    assert rows.shape == (NUM_CODES + 1, HIDDEN)
    assert torch.allclose(rows[:-1].square().mean(-1), torch.ones(NUM_CODES), atol=1e-4)
    assert torch.equal(rows[-1], torch.zeros(HIDDEN))


def test_round_trip_and_foreign_files(tmp_path):
    network, path = random_corrector(), tmp_path / "corrector.safetensors"
    network.save(path)
    again = DraftCorrector.load(path, HIDDEN).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(again[name], value.half().float())
    with pytest.raises(ValueError, match="is of a model of width 5, this one has 6"):
        DraftCorrector.load(path, 6)
    (tmp_path / "text.safetensors").write_text("no network")
    with pytest.raises(ValueError, match="is no corrector of drafts"):
        DraftCorrector.load(tmp_path / "text.safetensors", HIDDEN)


@pytest.mark.parametrize("guidance", ["off", "constant", "by slot"])
@pytest.mark.parametrize(("rounds", "candidates"), [(1, NUM_CODES), (3, NUM_CODES), (2, 3)])
def test_a_round_takes_the_best_code_of_the_changed_law(tmp_path, guidance, rounds, candidates):
    """Against the formula slot by slot, on both sides of guidance; a round reads what the last one wrote."""
    rng, size = torch.Generator().manual_seed(1), (40, 5)
    path = tmp_path / "corrector.safetensors"
    random_corrector().save(path)
    network = DraftCorrector.load(path, HIDDEN)
    sides = 1 if guidance == "off" else 2
    scale = {"off": 1.0, "constant": 2.5, "by slot": 3 * torch.rand(size, generator=rng)}[guidance]
    table = torch.randn(NUM_CODES + 2, HIDDEN, generator=rng)  # there are two structural tokens
    hidden = torch.randn(sides * size[0], size[1], HIDDEN, generator=rng)
    log, noise = torch.randn(2, *size, NUM_CODES, generator=rng)
    fed, tokens = torch.randint(NUM_CODES + 2, (2, *size), generator=rng)
    is_code = fed < NUM_CODES
    tokens = tokens.clamp_max(NUM_CODES - 1).where(is_code, fed)
    levels = torch.randint(2, size, generator=rng)
    settled = torch.arange(size[1]) <= torch.randint(size[1], (size[0], 1), generator=rng)
    correction, temperature = Correction(str(path), rounds=rounds, candidates=candidates), 0.4
    corrected = Corrected(correction, temperature, table, NUM_CODES)
    slots = Slots(fed, is_code, levels, gumbel=noise)
    verdict = Verdict(tokens, torch.ones_like(is_code), tokens)
    found = corrected(slots, verdict, Scores(log, Read(hidden, scale)), settled)
    rows = F.rms_norm(table[:NUM_CODES], (HIDDEN,))
    best = (log + noise).masked_fill(
        log + noise < (log + noise).topk(candidates).values[..., -1:], -torch.inf
    )
    wanted = tokens.clone()
    for _ in range(rounds):
        before = wanted.clone()
        for row, slot in product(range(size[0]), range(1, size[1])):
            if settled[row, slot] or not is_code[row, slot]:
                continue
            left, now = int(fed[row, slot - 1]), int(before[row, slot - 1])
            is_known = left < NUM_CODES and levels[row, slot - 1] == 0
            units = []
            for side in range(sides):
                state = network.state(F.rms_norm(hidden[side * size[0] + row, slot], (HIDDEN,)))
                old = network.old(rows[left]) if is_known else 0
                new = network.new(rows[now]) if now < NUM_CODES else 0
                units.append(F.gelu(state + old + new))
            its = scale[row, slot] if isinstance(scale, torch.Tensor) else scale
            mixed = units[0] if sides == 1 else units[1] + its * (units[0] - units[1])
            change = rows @ network.out(mixed) / temperature
            wanted[row, slot] = best[row, slot].add(change).argmax()
    assert torch.equal(found, wanted)
    assert not torch.equal(wanted, tokens)


def test_a_network_in_half_precision_corrects_too():
    """As in a training whose weights all have 16 bits."""
    network = random_corrector().bfloat16()
    table, log = torch.randn(NUM_CODES + 1, HIDDEN), torch.randn(2, 3, NUM_CODES)
    corrected = Corrected(Correction("own", candidates=NUM_CODES), 1.0, table.bfloat16(), NUM_CODES, network)
    tokens = log.argmax(-1)
    slots = Slots(tokens, tokens >= 0, torch.zeros_like(tokens), gumbel=torch.zeros_like(log))
    scores = Scores(log, Read(torch.randn(4, 3, HIDDEN).bfloat16(), 2.0))
    found = corrected(slots, Verdict(tokens, tokens >= 0, tokens), scores, tokens < 0)
    assert found.shape == tokens.shape
    assert torch.equal(found[:, 0], tokens[:, 0])


def test_only_candidates_are_chosen(tmp_path):
    path = tmp_path / "corrector.safetensors"
    random_corrector().save(path)
    table, log = torch.randn(NUM_CODES, HIDDEN), torch.randn(1, 3, NUM_CODES)
    slots = Slots(
        torch.zeros(1, 3, dtype=torch.long),
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, 3, dtype=torch.long),
        gumbel=torch.zeros(1, 3, NUM_CODES),
    )
    best = log.argmax(-1)
    verdict = Verdict(best, torch.ones(1, 3, dtype=torch.bool), best)
    one = Corrected(Correction(str(path), rounds=3, candidates=1), 1.0, table, NUM_CODES)
    read = Read(torch.randn(1, 3, HIDDEN), 1.0)
    assert torch.equal(one(slots, verdict, Scores(log, read), torch.zeros(1, 3, dtype=torch.bool)), best)


@pytest.mark.parametrize(
    ("num_levels", "guidance", "width"), [(0, 1.0, 1), (1, 2.0, 1), (2, 1.0, 1), (1, 2.0, 2)]
)
def test_images_stay_those_of_autoregression(tmp_path, num_levels, guidance, width):
    """With a network of random numbers, which is wrong everywhere; beside a tree too."""
    backbone = tiny_chameleon(12, hidden_size=16, seed=5, scale=0.5)
    path, layout = tmp_path / "corrector.safetensors", backbone.layout(10, 8)
    random_corrector(16).save(path)
    sampling = Sampling(guidance_scale=guidance)
    config = DecodingConfig("sjd2", 9, num_levels, sampling=sampling, corrector=Correction(str(path)))
    config = replace(config, tree=replace(config.tree, width=width, depth=2, length=2))
    prompts, seeds = list(RAGGED_PROMPTS[:4]), [1, 2, 3, 4]
    wanted = decode(backbone, prompts, seeds, replace(AR, sampling=sampling), layout)
    found = decode(backbone, prompts, seeds, config, layout)
    assert torch.equal(found.slot_ids, wanted.slot_ids)
    plain = decode(backbone, prompts, seeds, replace(config, corrector=Correction()), layout)
    assert int(found.stats.nfe.sum()) > int(plain.stats.nfe.sum()), "it has no say in drafts"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"acceptance": "exact"}, "needs acceptance=replay"),
        ({"sampling": Sampling(0.0)}, "needs a temperature above 0"),
        ({"pairs": PairSweeps(__file__)}, "corrects in place of pairs.table"),
        ({"corrector": Correction("none.safetensors")}, "there is no such file"),
        ({"corrector": Correction(__file__, rounds=0)}, "must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, problem):
    config = replace(DecodingConfig("sjd2", 8, 1, corrector=Correction(__file__)), **changes)
    assert any(problem in line for line in config.problems())


def test_guided_units_are_mixed_like_logits():
    units = torch.randn(4, 3, 5)
    assert torch.allclose(guided(units, 1.5), units[2:] + 1.5 * (units[:2] - units[2:]))
