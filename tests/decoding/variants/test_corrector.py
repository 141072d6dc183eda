"""The corrector of drafts: what it changes, its file, what it is worth, and that it changes no image."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Correction, PairSweeps
from sjd2_lightning.decoding.rules import Scores, Slots, Verdict
from sjd2_lightning.decoding.variants import corrector
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
    old, new = torch.randint(NUM_CODES + 1, (2, 9, 2))
    rows = code_rows(torch.randn(NUM_CODES, HIDDEN), NUM_CODES)
    assert not DraftCorrector(HIDDEN, 4).change(rows, old, new).any()


def test_neighbours_that_stay_change_nothing():
    rows = code_rows(torch.randn(NUM_CODES, HIDDEN), NUM_CODES)
    old, new = torch.randint(NUM_CODES + 1, (2, 300, 2), generator=torch.Generator().manual_seed(0))
    change = random_corrector().change(rows, old, new)
    assert torch.equal(change.abs().amax(1) > 0, (old != new).any(1))
    back = random_corrector().change(rows, new, old)
    assert torch.allclose(change, -back, atol=1e-5), "what returns is as it was"


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
    with pytest.raises(ValueError, match="is no corrector of drafts of this version"):
        DraftCorrector.load(tmp_path / "text.safetensors", HIDDEN)


@pytest.mark.parametrize("with_upper", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_round_takes_the_best_code_of_the_changed_law(tmp_path, monkeypatch, rounds, with_upper):
    """Against the formula slot by slot; a round reads what the last one wrote."""
    monkeypatch.setattr(corrector, "_FRONT", 3)
    rng, size = torch.Generator().manual_seed(1), (40, 9)
    path = tmp_path / "corrector.safetensors"
    random_corrector().save(path)
    network = DraftCorrector.load(path, HIDDEN)
    table = torch.randn(NUM_CODES + 2, HIDDEN, generator=rng)  # there are two structural tokens
    log, noise = torch.randn(2, *size, NUM_CODES, generator=rng)
    fed, tokens = torch.randint(NUM_CODES + 2, (2, *size), generator=rng)
    is_code = fed < NUM_CODES
    tokens = tokens.clamp_max(NUM_CODES - 1).where(is_code, fed)
    levels = torch.randint(2, size, generator=rng)
    settled = torch.arange(size[1]) <= torch.randint(size[1], (size[0], 1), generator=rng)
    upper = torch.arange(size[1]).expand(size) - torch.randint(2, 5, (size[0], 1), generator=rng)
    upper = upper if with_upper else torch.full(size, -1)
    temperature = 0.4
    corrected = Corrected(Correction(str(path), rounds=rounds), temperature, table, NUM_CODES)
    slots = Slots(fed, is_code, levels, gumbel=noise, upper=upper)
    verdict = Verdict(tokens, torch.ones_like(is_code), tokens)
    found = corrected(slots, verdict, Scores(log), settled)
    rows = torch.cat([F.rms_norm(table[:NUM_CODES], (HIDDEN,)), torch.zeros(1, HIDDEN)])

    def corrected_slot(row: int, slot: int, now: list[int]) -> int:
        """What a slot becomes beside the tokens of its window."""
        if settled[row, slot] or not is_code[row, slot]:
            return now[slot]
        beside = {slot - 1: network.left}
        if upper[row, slot] >= 0:
            beside[int(upper[row, slot])] = network.above
        units = torch.zeros(6)
        for place, said in beside.items():
            was = int(fed[row, place]) if levels[row, place] == 0 else NUM_CODES
            units += F.gelu(said(rows[min(now[place], NUM_CODES)])) - F.gelu(said(rows[min(was, NUM_CODES)]))
        change = rows[:-1] @ network.out(units) / temperature
        return int((log[row, slot] + noise[row, slot] + change).argmax())

    for row in range(size[0]):
        now = tokens[row].tolist()
        read, turn = now[:-1], list(range(size[1]))
        for _ in range(rounds):
            now_read = {slot: now[slot - 1] for slot in turn if slot}
            after = {slot: corrected_slot(row, slot, now) for slot in turn}
            for slot, code in after.items():
                now[slot] = code
            for slot, left in now_read.items():
                read[slot - 1] = left
            # three slots: first those whose left neighbour has changed since they were corrected, then others
            same = [slot == 0 or read[slot - 1] == now[slot - 1] for slot in range(size[1])]
            turn = sorted(range(size[1]), key=lambda slot: (same[slot], slot))[:3]
        assert found[row].tolist() == now
    assert not torch.equal(found, tokens)


def test_further_rounds_settle_a_window(tmp_path):
    """As many rounds as there are slots leave no slot that its neighbours would change."""
    rng, size = torch.Generator().manual_seed(2), (20, 12)
    path = tmp_path / "corrector.safetensors"
    random_corrector().save(path)
    table, log = torch.randn(NUM_CODES, HIDDEN, generator=rng), torch.randn(*size, NUM_CODES, generator=rng)
    tokens = torch.randint(NUM_CODES, size, generator=rng)
    levels, upper = torch.ones(size, dtype=torch.long), torch.full(size, -1)
    slots = Slots(tokens, tokens >= 0, levels, gumbel=torch.zeros_like(log), upper=upper)
    settled = torch.arange(size[1]) < 1

    def after(rounds: int) -> torch.Tensor:
        one = Corrected(Correction(str(path), rounds=rounds), 1.0, table, NUM_CODES)
        return one(slots, Verdict(tokens, tokens >= 0, tokens), Scores(log), settled.expand(size))

    assert torch.equal(after(12), after(30))
    assert not torch.equal(after(2), after(12))


def test_a_network_in_half_precision_corrects_too():
    """As in a training whose weights all have 16 bits."""
    network = random_corrector().bfloat16()
    table, log = torch.randn(NUM_CODES + 1, HIDDEN), torch.randn(2, 3, NUM_CODES)
    corrected = Corrected(Correction("own"), 1.0, table.bfloat16(), NUM_CODES, network)
    tokens = log.argmax(-1)
    levels, upper = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    slots = Slots(tokens, tokens >= 0, levels, gumbel=torch.zeros_like(log), upper=upper)
    found = corrected(slots, Verdict(tokens, tokens >= 0, tokens), Scores(log), tokens < 0)
    assert found.shape == tokens.shape
    assert torch.equal(found[:, 0], tokens[:, 0])


@pytest.mark.parametrize("width", [16, 10])
def test_the_slot_above_is_one_row_up(monkeypatch, width):
    """In rows of a batch whose images differ in width, and in whose windows several rows lie."""
    backbone = tiny_chameleon(12, hidden_size=16, seed=5, scale=0.5)
    backbone.corrector, seen = random_corrector(16), []
    real = Corrected.__call__

    def kept(self, slots, *rest):
        seen.append(slots.upper)
        return real(self, slots, *rest)

    monkeypatch.setattr(Corrected, "__call__", kept)
    layouts = [backbone.layout(12, width), backbone.layout(12, 8)]
    config = DecodingConfig("sjd2", 12, 1, corrector=Correction("own"))
    heads = []
    decode(backbone, list(RAGGED_PROMPTS[:2]), [1, 2], config, layouts, lambda this: heads.append(this.heads))
    for head, upper in zip(heads, seen, strict=True):
        if len(head) < 2:
            break
        for row, layout in enumerate(layouts):
            codes = layout.code_slots.tolist()
            for place in range(12):
                slot = int(head[row]) + place
                if slot in codes and (number := codes.index(slot)) >= layout.width:
                    assert upper[row, place] == codes[number - layout.width] - int(head[row])
                else:
                    assert upper[row, place] < 0


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
