"""The drafter of blocks: what it guesses and where it writes it, its file, and that it changes no image."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import Drafting
from sjd2_lightning.decoding.method import Method
from sjd2_lightning.decoding.rules import Read, Scores, Verdict
from sjd2_lightning.decoding.variants.drafter import BlockDrafts, places_of
from sjd2_lightning.decoding.window import Window
from sjd2_lightning.models.backbone import ImageLayout, rows_with_newlines
from sjd2_lightning.models.block_drafter import BlockDrafter, copied_logits
from sjd2_lightning.noise import NoiseProcess
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon

AR = DecodingConfig("ar", window=1)
NUM_CODES, HIDDEN = 7, 5
# slots 0 1 2 | end 3, 4 5 6 | end 7, 8 9 10
LAYOUT = rows_with_newlines(3, 3, NUM_CODES, (3, 3))


def random_drafter(path, hidden_size: int = HIDDEN, num_layers: int = 1) -> BlockDrafter:
    """One whose numbers are all random, as its file holds it."""
    torch.manual_seed(0)
    found = BlockDrafter(hidden_size, 8, num_layers)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    found.save(path)
    return BlockDrafter.load(path, hidden_size)


def test_round_trip_and_foreign_files(tmp_path):
    path = tmp_path / "drafter.safetensors"
    network = random_drafter(path, num_layers=2)
    for name, value in BlockDrafter.load(path, HIDDEN).state_dict().items():
        assert torch.equal(network.state_dict()[name], value)
    with pytest.raises(ValueError, match="is of a model of width 5, this one has 6"):
        BlockDrafter.load(path, 6)
    (tmp_path / "text.safetensors").write_text("no network")
    with pytest.raises(ValueError, match="is no drafter of blocks"):
        BlockDrafter.load(tmp_path / "text.safetensors", HIDDEN)
    with pytest.raises(ValueError, match="width=40: must be a multiple of 32"):
        BlockDrafter(HIDDEN, 40)


def test_a_new_one_copies_the_code_one_row_up():
    torch.manual_seed(0)
    network = BlockDrafter(64, 96)
    table = torch.randn(50, 64)
    codes = network.of_codes(table, 50)
    layout = rows_with_newlines(3, 8, 50, (3, 8))
    places = places_of(layout, 26)[None]
    standing = torch.randint(50, (1, 9))
    known = network.known(torch.randn(1, 9, 64), standing, places[:, :17], codes)
    lefts = torch.full((1, 8), 50)
    assert not (network.units(known, lefts, codes) @ codes.effect.T).any()
    guesses = copied_logits(known.copied, standing, lefts, 50).argmax(-1)
    assert guesses[0].tolist() == standing[0, :8].tolist()


def test_a_slot_does_not_depend_on_those_to_its_right(tmp_path):
    """So it does not matter how many slots enter: as many are guessed in every pass."""
    network = random_drafter(tmp_path / "drafter.safetensors", num_layers=2)
    codes = network.of_codes(torch.randn(NUM_CODES, HIDDEN), NUM_CODES)
    hidden, standing = torch.randn(2, 4, HIDDEN), torch.randint(NUM_CODES, (2, 4))
    places = torch.randint(4, (2, 8, 2)).float()
    lefts = torch.full((2, 4), NUM_CODES)
    far = network.known(hidden, standing, places, codes)
    near = network.known(hidden, standing, places[:, :6], codes)
    assert torch.allclose(far.copied[:, :2], near.copied, atol=1e-5)
    units = network.units(far, lefts, codes)[:, :2]
    assert torch.allclose(units, network.units(near, lefts[:, :2], codes), atol=1e-5)


def test_codes_that_are_unknown_are_not_copied():
    copied = torch.tensor([[[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]]])
    found = copied_logits(copied, torch.tensor([[2, 3, 2]]), torch.tensor([[0, 3]]), 3)
    assert found.tolist() == [[[8.0, 0.0, 5.0], [0.0, 0.0, 5.0]]]


def test_places_are_rows_and_columns():
    assert places_of(LAYOUT, 13).long().tolist() == [
        *([0, column] for column in range(4)),
        *([1, column] for column in range(4)),
        *([2, column] for column in (0, 1, 2, 2, 2)),
    ]
    two = ImageLayout(1, 6, (-1,) * 6, (2, 2), grids=((1, 2), (2, 2)))
    assert places_of(two, 6).long().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]


@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("guidance", ["off", "constant", "by slot"])
def test_guesses_are_the_best_codes_behind_the_guess_on_their_left(tmp_path, guidance, rounds):
    """Against the formula written out slot by slot, on both sides of guidance."""
    rng, num = torch.Generator().manual_seed(1), 5
    path = tmp_path / "drafter.safetensors"
    network = random_drafter(path)
    table = torch.randn(NUM_CODES + 1, HIDDEN, generator=rng)
    sampling = Sampling(0.6, guidance_scale=1.0 if guidance == "off" else 2.5)
    drafts = BlockDrafts(Drafting(str(path), rounds, NUM_CODES), sampling, table, NUM_CODES)
    sides = 1 if guidance == "off" else 2
    scale = torch.rand(20, num, generator=rng) * 3 if guidance == "by slot" else sampling.guidance_scale
    hidden = torch.randn(sides * 20, num, HIDDEN, generator=rng)
    standing = torch.randint(NUM_CODES + 1, (20, num), generator=rng)
    places = torch.randint(4, (20, 2 * num, 2), generator=rng).float()
    noise = torch.randn(20, num, NUM_CODES, generator=rng)
    is_code = torch.rand(20, num, generator=rng) < 0.7
    scores = Scores(torch.zeros(20, num, NUM_CODES), Read(hidden, scale))
    found = drafts.guesses(scores, standing, places, noise, is_code)
    codes = network.of_codes(table, NUM_CODES)
    assert torch.allclose(codes.read[:-1], network.code(F.rms_norm(table[:NUM_CODES], (HIDDEN,))))
    known = [
        network.known(hidden[side * 20 : side * 20 + 20], standing, places, codes) for side in range(sides)
    ]
    guesses = torch.full((20, num), NUM_CODES)
    for now in range(rounds + 1):
        before = guesses.clone()
        for row, slot in product(range(20), range(num)):
            if slot:
                left = before[row, slot - 1] if is_code[row, slot - 1] and now else NUM_CODES
            else:
                left = standing[row, -1]
            lefts = torch.full((20, num), int(left))
            logits = [
                codes.effect @ network.units(its, lefts, codes)[row, slot]
                + copied_logits(its.copied, standing, lefts, NUM_CODES)[row, slot]
                for its in known
            ]
            its = scale[row, -1] if isinstance(scale, torch.Tensor) else scale
            mixed = logits[0] if sides == 1 else logits[1] + its * (logits[0] - logits[1])
            guesses[row, slot] = (mixed / 0.6 + noise[row, slot]).argmax()
    assert torch.equal(found, guesses)


@pytest.mark.parametrize("num_levels", [0, 2])
def test_it_writes_codes_that_have_just_entered_and_nothing_else(tmp_path, num_levels):
    path = tmp_path / "drafter.safetensors"
    random_drafter(path)
    table = torch.randn(NUM_CODES + 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    config = DecodingConfig("sjd2", 5, num_levels, drafter=Drafting(str(path)))
    method = Method(config, table, NUM_CODES)
    (event,) = method.on_entry
    state = method.begin(torch.tensor([1, 2, 3]), [LAYOUT] * 3, LAYOUT.num_slots + 5)
    asked = {}

    def guesses(scores, standing, places, noise, is_code):
        asked.update(standing=standing, places=places, noise=noise, is_code=is_code)
        return torch.full_like(standing, 6)

    event.guesses = guesses
    state.tokens.copy_(torch.arange(30, 46).expand(3, -1))
    state.levels[:, 2] = num_levels  # a slot that is noisy still
    window = Window(method.source, state)
    tokens, levels = state.tokens.clone(), state.levels.clone()
    verdict = Verdict(window.slots().tokens, window.slots().is_code, window.slots().tokens)
    scores = Scores(torch.zeros(3, 5, NUM_CODES))
    committed = torch.tensor([1, 4, 0])
    window.advance(committed, committed, verdict, scores)
    event.entered(window, committed, scores)
    # of the slots right of the first window, 5 .. 8 at most: 7 is the end of a row
    for row, new in enumerate(([5], [5, 6, 8], [])):
        for slot in range(state.tokens.shape[1]):
            wanted = (6, 0) if slot in new else (int(tokens[row, slot]), int(levels[row, slot]))
            assert (int(state.tokens[row, slot]), int(state.levels[row, slot])) == wanted
    assert asked["is_code"].tolist() == [[True, True, False, True, True]] * 3
    assert torch.equal(asked["places"], places_of(LAYOUT, 10).expand(3, -1, -1))
    assert torch.equal(asked["noise"], method.source.gumbel(state.seeds, torch.arange(5, 10)))
    assert (asked["standing"] == NUM_CODES).all(), "ids of no code, and noise, are unknown"


@pytest.mark.parametrize(
    ("num_levels", "guidance", "width"), [(0, 1.0, 1), (1, 2.0, 1), (2, 1.0, 1), (1, 2.0, 2), (0, 1.0, 2)]
)
@pytest.mark.parametrize("window", [9, 40])
def test_images_stay_those_of_autoregression(tmp_path, window, num_levels, guidance, width):
    """With a network of random numbers, which is wrong everywhere; rows end in structural slots."""
    backbone = tiny_chameleon(12, hidden_size=16, seed=5, scale=0.5)
    path, layouts = tmp_path / "drafter.safetensors", [backbone.layout(10, 8)] * 3 + [backbone.layout(4, 12)]
    random_drafter(path, 16)
    sampling = Sampling(guidance_scale=guidance)
    config = DecodingConfig("sjd2", window, num_levels, sampling=sampling, drafter=Drafting(str(path)))
    config = replace(config, tree=replace(config.tree, width=width, depth=2, length=2))
    prompts, seeds = list(RAGGED_PROMPTS[:4]), [1, 2, 3, 4]
    wanted = decode(backbone, prompts, seeds, replace(AR, sampling=sampling), layouts)
    found = decode(backbone, prompts, seeds, config, layouts)
    assert torch.equal(found.slot_ids, wanted.slot_ids)
    plain = decode(backbone, prompts, seeds, replace(config, drafter=Drafting()), layouts)
    if window == 9:  # a window beyond the image leaves nothing to guess
        assert found.stats.committed.tolist() != plain.stats.committed.tolist(), "it has no say in drafts"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"acceptance": "exact"}, "needs acceptance=replay"),
        ({"sampling": Sampling(0.0)}, "needs a temperature above 0"),
        ({"draft_init": "repeat_above"}, "guesses in place of draft_init=repeat_above"),
        ({"noise": NoiseProcess(source="above")}, "guesses in place of noise.source=above"),
        ({"drafter": Drafting("none.safetensors")}, "there is no such file"),
        ({"drafter": Drafting(__file__, rounds=-1)}, "must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, problem):
    config = replace(DecodingConfig("sjd2", 8, 1, drafter=Drafting(__file__)), **changes)
    assert any(problem in line for line in config.problems())
