"""The corrector that is trained beside the objective: the passes it learns from, and what it is worth."""

from dataclasses import replace

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.decoding.config import OWN, Correction
from sjd2_lightning.models.draft_corrector import DraftCorrector
from sjd2_lightning.training import redrafting
from sjd2_lightning.training.batch import NoisyCodes
from sjd2_lightning.training.noise import draw_levels
from sjd2_lightning.training.redrafting import CorrectorTraining, corrections_of
from sjd2_lightning.training.states import TeacherForced, logits_of
from tests.tools.tiny_backbones import RAGGED_PROMPTS, tiny_chameleon
from tests.training.test_module import NOISE, batch_of, module_of, train

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # no trainer here
PASSES = 3
TRAINING = CorrectorTraining(width=8, passes=PASSES)


@pytest.fixture(scope="module")
def backbone():
    """A model in which a code depends on the one to its left."""
    found = tiny_chameleon(12, hidden_size=16, seed=5, scale=0.8).requires_grad_(False)
    found.corrector = DraftCorrector(16, 8)
    return found


def images_of(backbone, num, seed=0):
    """Images that the model itself draws, under teacher forcing."""
    layout = backbone.layout(16, 16)
    prompts = [RAGGED_PROMPTS[number % 4] for number in range(num)]
    drawn = decode(backbone, prompts, range(seed, seed + num), DecodingConfig("ar", window=1), layout)
    return TeacherForced([backbone.prompt_ids(p, layout) for p in prompts], drawn.image_ids.clone(), layout)


@pytest.mark.parametrize("noisy", [True, False])
def test_passes_are_those_of_decoding(backbone, monkeypatch, noisy):
    """What each pass is fed, against drafts made slot by slot from whole logits of the pass before."""
    sample, seen, kept = images_of(backbone, 3), [], {}
    real_hidden, real_gumbel = redrafting.hidden_of, redrafting.posterior_gumbel

    def hidden_of(model, its, noise):
        seen.append((its, noise))
        return real_hidden(model, its, noise)

    def posterior(law, codes, race):
        kept["gumbel"] = real_gumbel(law, codes, race)
        return kept["gumbel"]

    monkeypatch.setattr(redrafting, "hidden_of", hidden_of)
    monkeypatch.setattr(redrafting, "posterior_gumbel", posterior)
    # one that changes nothing: drafts are what the pass itself makes of a slot
    corrections_of(backbone, sample, TRAINING, noisy, torch.Generator().manual_seed(4))
    ids = sample.image_ids.flatten(1)
    top = draw_levels(*ids.shape, PASSES, redrafting._RUNS, torch.Generator().manual_seed(4))
    assert len(set(top.flatten().tolist())) == PASSES + 1
    begins = torch.arange(ids.shape[1]) % sample.layout.width == 0
    read = (top > 0) | ((torch.nn.functional.pad(top, (1, 0))[:, :-1] > 0) & ~begins)
    gumbel = torch.zeros(*ids.shape, 12).masked_scatter(read[..., None], kept["gumbel"])
    assert seen[0][1] is None
    assert torch.equal(seen[0][0].image_ids, sample.image_ids)
    assert len(seen) == PASSES + 1
    before = None
    for number, (its, noise) in enumerate(seen[1:]):
        fed, ago = its.image_ids.flatten(1), PASSES - 1 - number
        levels = torch.where(top > 0, (top + ago).clamp_max(PASSES), 0)
        assert torch.equal(fed[top == 0], ids[top == 0]), "what was committed is what it is"
        if noisy:
            assert torch.equal(noise.levels, (levels == PASSES).long())
        else:
            assert noise is None
        entered, first = levels == PASSES, seen[1][0].image_ids.flatten(1)
        assert noisy or torch.equal(fed[entered], first[entered]), "it is new to the window"
        drafted = (levels > 0) & (levels < PASSES)
        if before is not None:
            assert drafted.any()
            assert torch.equal(fed[drafted], before[drafted])
        clean = noise if noise is None else NoisyCodes(*noise)
        before = (logits_of(backbone, its, clean) + gumbel).argmax(-1)
    law = logits_of(backbone, sample, None).log_softmax(-1)
    assert torch.equal((law + gumbel).argmax(-1)[read], ids[read]), "the image is what decoding draws"


@pytest.mark.parametrize("noisy", [True, False])
def test_a_neighbour_is_what_decoding_calls_one(backbone, monkeypatch, noisy):
    """Behind a row's end there is none, and what entered as noise is not known."""
    sample, read = images_of(backbone, 2), []
    width, codes = sample.layout.width, backbone.num_codes
    real = backbone.corrector.change

    def change(rows, old, new):
        read.append((old, new))
        return real(rows, old, new)

    monkeypatch.setattr(backbone.corrector, "change", change)
    corrections_of(backbone, sample, TRAINING, noisy, torch.Generator().manual_seed(4))
    ids = sample.image_ids.flatten(1)
    top = draw_levels(*ids.shape, PASSES, redrafting._RUNS, torch.Generator().manual_seed(4))
    columns = torch.arange(ids.shape[1]) % width
    begins = {1: (columns == 0).expand_as(top), width: (torch.arange(ids.shape[1]) < width).expand_as(top)}
    of_left = torch.nn.functional.pad(top, (1, 0))[:, :-1]
    chosen = (top > 0) | ((of_left > 0) & ~begins[1])
    old, new = read[-1]  # of the last pass
    for side, (distance, alone) in enumerate(begins.items()):
        before, beside = (
            torch.nn.functional.pad(value, (distance, 0))[:, :-distance] for value in (top, ids)
        )
        assert torch.equal(new[:, side], torch.where(alone, codes, beside)[chosen])
        entered, settled = (before == PASSES) & ~alone, (before == 0) & ~alone
        assert (old[alone[chosen], side] == codes).all()
        assert (old[entered[chosen], side] == codes).all() == noisy
        assert torch.equal(old[settled[chosen], side], beside[settled & chosen])


def test_of_a_large_codebook_a_part_of_the_image_is_open(backbone, monkeypatch):
    sample, seen = images_of(backbone, 2), []
    real = redrafting.posterior_gumbel
    monkeypatch.setattr(
        redrafting, "posterior_gumbel", lambda law, *rest: seen.append(law) or real(law, *rest)
    )
    for most in (10**9, 12 * 10):
        monkeypatch.setattr(redrafting, "_MOST_NUMBERS", most)
        corrections_of(backbone, sample, TRAINING, True, torch.Generator().manual_seed(4))
    whole, part = (len(law) for law in seen)
    assert part <= 2 * (10 + 1) < whole


def test_it_learns_from_real_images_what_saves_passes_of_others(backbone):
    torch.manual_seed(0)
    backbone.corrector = DraftCorrector(16, 32)
    optimizer = torch.optim.AdamW(backbone.corrector.parameters(), 3e-3)
    rng, rights = torch.Generator().manual_seed(1), []
    sample = images_of(backbone, 160)
    for step in range(150):
        some = slice(step % 5 * 32, step % 5 * 32 + 32)
        its = sample._replace(prompts=sample.prompts[some], image_ids=sample.image_ids[some])
        found = corrections_of(backbone, its, TRAINING, True, rng)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        rights.append(float(found.right))
    assert sum(rights[-20:]) > sum(rights[:20]) + 20 * 0.05
    backbone.corrector.requires_grad_(False)
    config = DecodingConfig("sjd2", 12, 1, corrector=Correction(OWN))
    passes, ids = {}, {}
    for name, method in {"own": config, "none": replace(config, corrector=Correction())}.items():
        output = decode(
            backbone, list(RAGGED_PROMPTS) * 6, range(1000, 1024), method, backbone.layout(16, 16)
        )
        passes[name], ids[name] = int(output.stats.nfe.sum()), output.slot_ids
    assert torch.equal(ids["own"], ids["none"])
    assert passes["own"] < 0.93 * passes["none"]
    backbone.corrector = DraftCorrector(16, 8)


@pytest.mark.parametrize(
    "changes",
    [{"acceptance": "exact"}, {"sampling": Sampling(0.0)}, {"window": 1}],
    ids=["exact", "greedy", "one slot"],
)
def test_a_method_that_cannot_use_the_own_one_goes_without(backbone, changes):
    config = replace(DecodingConfig("sjd2", 6, 1, corrector=Correction(OWN)), **changes)
    assert not config.problems()
    assert not config.corrects
    layout, prompts = backbone.layout(8, 8), list(RAGGED_PROMPTS[:2])
    backbone.corrector = DraftCorrector(16, 4)
    torch.nn.init.normal_(backbone.corrector.out.weight)
    its = decode(backbone, prompts, [1, 2], config, layout)
    plain = decode(backbone, prompts, [1, 2], replace(config, corrector=Correction()), layout)
    assert its.stats.nfe.tolist() == plain.stats.nfe.tolist()
    backbone.corrector = DraftCorrector(16, 8)


def test_its_loss_leaves_the_trunk_alone():
    training = CorrectorTraining(width=8)
    module = module_of(NOISE, corrector=training)
    torch.nn.init.normal_(module.backbone.corrector.out.weight)
    images = images_of(module.backbone.eval(), 2)
    corrections_of(module.backbone, images, training, True, torch.Generator().manual_seed(0)).loss.backward()
    trunk = [p for name, p in module.backbone.named_parameters() if ".layers." in name]
    assert all(p.grad is None for p in trunk)
    assert all(p.grad is not None for p in module.backbone.corrector.parameters())


def test_a_step_adds_its_loss_to_that_of_the_objective():
    losses = {}
    for name, training in {
        "none": CorrectorTraining(),
        "every": CorrectorTraining(width=8),
        "seldom": CorrectorTraining(width=8, every=2),
    }.items():
        module, logged = module_of(NOISE, corrector=training), {}
        module.log = lambda key, value, logged=logged, **_: logged.update({key: float(value.detach())})
        losses[name] = float(module.training_step(batch_of(), 0))
        assert ("train/loss_drafts" in logged) is (name != "none")
        if name != "none":
            assert losses[name] == pytest.approx(losses["none"] + logged["train/loss_drafts"], rel=1e-5)
            assert 0 <= logged["train/right_drafts"] <= 1


def test_it_has_a_rate_of_its_own():
    trainer = train(module_of(NOISE, corrector=CorrectorTraining(width=8, lr=7e-3)), 1)
    rates = {group["initial_lr"]: len(group["params"]) for group in trainer.optimizers[0].param_groups}
    assert rates[7e-3] == len(list(DraftCorrector(1, 1).parameters()))
    assert len(rates) == 2


def test_in_other_steps_it_does_not_learn_and_ranks_still_find_its_gradients():
    module = module_of(NOISE, corrector=CorrectorTraining(width=8, every=2))
    module.log = lambda *_, **__: None
    type(module).global_step = property(lambda self: 1)
    try:
        module.training_step(batch_of(), 0).backward()
    finally:
        del type(module).global_step
    assert all(p.grad is not None and not p.grad.any() for p in module.backbone.corrector.parameters())


def test_one_that_is_there_is_trained_on_or_kept():
    module = module_of(NOISE, corrector=CorrectorTraining(width=8))
    head = module.backbone.corrector
    again = module_of(NOISE, module.backbone, corrector=CorrectorTraining(width=8))
    assert again.backbone.corrector is head
    assert head.left.weight.requires_grad
    kept = module_of(NOISE, module.backbone)
    assert kept.backbone.corrector is head
    assert not head.left.weight.requires_grad
    other = module_of(NOISE, module.backbone, corrector=CorrectorTraining(width=4))
    assert other.backbone.corrector.width == 4
