"""What noisy codes of training hold: against the slow decoder's own steps, and the gradients behind it."""

from dataclasses import fields

import pytest
import torch

from sjd2_lightning.decoding import DecodingConfig
from sjd2_lightning.noise import NoiseProcess, timesteps
from sjd2_lightning.training import states
from sjd2_lightning.training.batch import NoisyCodes
from sjd2_lightning.training.noise import RampLaw, TrainingNoise
from sjd2_lightning.training.states import TeacherForced, logits_of, noisy_codes, posterior_gumbel, walk
from tests.tools.slow_loop import Slot, SlowDecoder
from tests.tools.tiny_backbones import NOISY_LEVELS, RAGGED_PROMPTS, tiny_chameleon

LEVELS = torch.tensor(NOISY_LEVELS)
OPTIONS = {
    "blended": {},
    "draft": {"state": "draft"},
    "tied": {"source": "tied"},
    "tied draft": {"source": "tied", "state": "draft"},
    "mean": {"source": "mean"},
    "mean draft": {"source": "mean", "state": "draft"},
    "expected": {"estimate": "expected"},
    "expected mean": {"source": "mean", "estimate": "expected"},
}


def with_process(**values) -> TrainingNoise:
    """Noise of training, the fields of its process beside the others."""
    names = {field.name for field in fields(NoiseProcess)}
    process = {name: values.pop(name) for name in names & set(values)}
    return TrainingNoise(process=NoiseProcess(**process), **values)


@pytest.fixture(scope="module")
def backbone():
    return tiny_chameleon(7, seed=2, scale=0.5).requires_grad_(False)


@pytest.fixture(scope="module")
def sample(backbone):
    """Images of 3 x 2 codes."""
    layout = backbone.layout(6, 4)
    prompts = [backbone.prompt_ids(prompt, layout) for prompt in RAGGED_PROMPTS]
    image_ids = torch.randint(7, (4, 3, 2), generator=torch.Generator().manual_seed(0))
    return TeacherForced(prompts, image_ids, layout)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Teacher(SlowDecoder):
    """The slow decoder with given Gumbel vectors: what it would have held when `levels` are what they are."""

    def judge(self, number, slot, law, iteration):
        token = int((torch.tensor(law).log() + self.vectors[number]).argmax())
        return token, False, token

    def states(self, tokens, levels, start, vectors) -> list[torch.Tensor]:
        """Of a row of slots: what noisy ones hold after they were denoised to `levels`, pass by pass."""
        top, self.vectors = self.config.num_levels, vectors
        window = [
            Slot(token, top if level else 0, noisy, None)
            for token, level, noisy in zip(tokens, levels, start, strict=True)
        ]
        for ago in range(top - 1, 0, -1):
            for slot, level in zip(window, levels, strict=True):
                assert slot.level == (min(top, level + ago) if level else 0)
            laws = self.laws(window)
            for number, (slot, level) in enumerate(zip(window, levels, strict=True)):
                if 0 < level <= top - ago:
                    self.renew(slot, self.judge(number, slot, laws[number], 0)[0], laws[number])
        return [slot.noisy for slot in window]


@pytest.mark.parametrize("option", OPTIONS)
def test_states_are_those_of_decoding(backbone, sample, option):
    """Every code takes the slow decoder's own steps, from its start to its level."""
    noise = with_process(trajectory=True, **OPTIONS[option])
    found = noisy_codes(backbone, sample, LEVELS, timesteps(3), noise, rng())
    log_probs = logits_of(backbone, sample, None).log_softmax(-1)
    race = torch.empty(log_probs.shape).exponential_(generator=rng())
    vectors = posterior_gumbel(log_probs, sample.image_ids.flatten(1), race)
    assert torch.equal((log_probs + vectors).argmax(-1), sample.image_ids.flatten(1))
    config = DecodingConfig("sjd2", 9, 3, noise=NoiseProcess(**OPTIONS[option]))
    slot_ids, is_code = sample.layout.slot_ids(sample.image_ids), sample.layout.code_slots
    moved = 0
    for row, prompt in enumerate(RAGGED_PROMPTS):
        per_slot = []
        for values in (LEVELS[row, :, None], found.eps[row], vectors[row]):
            wide = torch.zeros(len(slot_ids[row]), values.shape[-1])
            per_slot.append(wide.index_copy(0, is_code, values.float()))
        levels, start, vectors_of = per_slot
        decoder = Teacher(backbone, prompt, 0, config, sample.layout)
        states = decoder.states(slot_ids[row].tolist(), levels[:, 0].long().tolist(), start, vectors_of)
        for code, slot in enumerate(is_code.tolist()):
            if LEVELS[row, code]:
                assert torch.allclose(found.states[row, code], states[slot], atol=1e-4), (row, code)
                moved += not torch.equal(states[slot], start[slot])
    assert moved == int(((LEVELS > 0) & (LEVELS < 3)).sum())


def test_drafts_are_embeddings_of_codes_below_the_top_and_noise_at_it(backbone, sample):
    noise = TrainingNoise(trajectory=True, process=NoiseProcess(state="draft"))
    found = noisy_codes(backbone, sample, LEVELS, timesteps(3), noise, rng())
    codes = backbone.slot_table()[:7]
    rows = (codes - codes.mean(0)) / codes.std(0, correction=0)
    distance = torch.cdist(found.states, rows).amin(-1)
    assert (distance[(LEVELS > 0) & (LEVELS < 3)] < 1e-4).all()
    assert torch.equal(found.states[LEVELS == 3], found.eps[LEVELS == 3])


def test_unmarked_drafts_look_like_clean_codes(backbone, sample):
    """Fed as the codes that they are: laws are those of an image with drafts in it, and noise at the top."""
    noise = TrainingNoise(trajectory=True, process=NoiseProcess(state="draft"), mark_drafts=False)
    found = noisy_codes(backbone, sample, LEVELS, timesteps(3), noise, rng())
    assert not found.marked
    codes, is_draft = backbone.slot_table()[:7], ((LEVELS > 0) & (LEVELS < 3))[..., None]
    drafts = (sample.image_ids.flatten(1) + 1) % 7  # all wrong
    rows = ((codes - codes.mean(0)) / codes.std(0, correction=0))[drafts]
    found = found._replace(states=rows.where(is_draft, found.states))
    image_ids = drafts.where(is_draft[..., 0], sample.image_ids.flatten(1)).view_as(sample.image_ids)
    same = NoisyCodes((LEVELS == 3).long(), timesteps(1), found.eps)
    wanted = logits_of(backbone, sample._replace(image_ids=image_ids), same)
    assert torch.allclose(logits_of(backbone, sample, found), wanted, atol=1e-4)
    marked = logits_of(backbone, sample, found._replace(marked=True))
    assert not torch.allclose(marked, wanted, atol=1e-2)


def test_a_certain_law_leads_to_the_image(backbone, sample):
    """Where Gumbel vectors decide the true tokens under any law, drafts are the image: its fixed point."""
    start = NoisyCodes(LEVELS, timesteps(3), torch.randn(4, 6, backbone.hidden_size, generator=rng()))
    truth = 1e3 * torch.nn.functional.one_hot(sample.image_ids.flatten(1), 7).float()
    states = walk(backbone, sample, start, truth, NoiseProcess())
    codes = backbone.slot_table()[:7]
    x0 = ((codes - codes.mean(0)) / codes.std(0, correction=0))[sample.image_ids.flatten(1)]
    t = (LEVELS / 3)[..., None]
    wanted = (1 - t) * x0 + t * start.eps
    assert torch.allclose(states[LEVELS > 0], wanted[LEVELS > 0], atol=1e-4)


def test_mean_embeddings_in_place_of_noise(backbone, sample):
    """Below the top the mean under the law of clean input, code by code; at the top nothing is known."""
    found = noisy_codes(
        backbone, sample, LEVELS, timesteps(3), TrainingNoise(process=NoiseProcess(source="mean")), rng()
    )
    law = logits_of(backbone, sample, None).softmax(-1)
    codes = backbone.slot_table()[:7]
    rows = (codes - codes.mean(0)) / codes.std(0, correction=0)
    for row, code in (LEVELS >= 0).nonzero().tolist():
        wanted = (
            sum(law[row, code, k] * rows[k] for k in range(7)) if LEVELS[row, code] < 3 else torch.zeros(8)
        )
        assert torch.allclose(found.eps[row, code], wanted, atol=1e-5)
    assert found.states is None


def test_codes_start_from_the_code_above(backbone, sample):
    """Row by row; nothing stands above the first one. A trajectory starts there too."""
    codes = backbone.slot_table()[:7]
    rows = (codes - codes.mean(0)) / codes.std(0, correction=0)
    for trajectory in (False, True):
        noise = TrainingNoise(process=NoiseProcess(source="above"), trajectory=trajectory)
        eps = noisy_codes(backbone, sample, LEVELS, timesteps(3), noise, rng()).eps
        eps = eps.unflatten(1, sample.image_ids.shape[1:])
        assert torch.equal(eps[:, 0], torch.zeros_like(eps[:, 0]))
        for image, row, column in (sample.image_ids[:, 1:] >= 0).nonzero().tolist():
            wanted = rows[sample.image_ids[image, row, column]]
            assert torch.allclose(eps[image, row + 1, column], wanted, atol=1e-5)


def test_the_default_draws_what_it_always_drew(backbone, sample):
    found = noisy_codes(backbone, sample, LEVELS, timesteps(3), TrainingNoise(), rng(5))
    assert torch.equal(found.eps, torch.randn(4, 6, backbone.hidden_size, generator=rng(5)))
    assert found.states is None


@pytest.mark.parametrize("values", [{}, {"source": "above"}, {"source": "mean"}, {"trajectory": True}])
def test_the_own_law_as_a_target_changes_no_noise(backbone, sample, values):
    """It is the law of clean input, without gradients, and draws nothing."""
    found = noisy_codes(backbone, sample, LEVELS, timesteps(3), with_process(**values), rng())
    assert found.clean_law is None
    told = noisy_codes(backbone, sample, LEVELS, timesteps(3), with_process(**values, consistency=0.5), rng())
    assert torch.equal(told.clean_law, logits_of(backbone, sample, None).log_softmax(-1))
    assert not told.clean_law.requires_grad
    for kept, again in ((found.eps, told.eps), (found.states, told.states)):
        assert (kept is None and again is None) or torch.equal(kept, again)


def test_noise_reaches_what_stands_right_of_it():
    levels = torch.tensor([[0, 2, 0, 0], [0, 0, 0, 1], [1, 0, 3, 0]])
    wanted = [[False, False, True, True], [False] * 4, [False, True, True, True]]
    assert NoisyCodes(levels, timesteps(3), torch.empty(0)).reaches().tolist() == wanted


def passes(backbone, call) -> int:
    """Forward passes of a call."""
    count = []
    handle = backbone.register_forward_hook(lambda *_: count.append(1))
    call()
    handle.remove()
    return len(count)


@pytest.mark.parametrize(
    ("values", "num_levels", "wanted"),
    [
        ({}, 3, 0),
        ({"source": "tied"}, 3, 1),
        ({"source": "mean"}, 3, 1),
        ({"trajectory": True}, 1, 1),
        ({"trajectory": True}, 3, 3),
        ({"trajectory": True, "source": "tied", "state": "draft"}, 5, 5),
        ({"consistency": 0.5}, 3, 1),
        ({"source": "above", "consistency": 1.0}, 3, 1),
        ({"trajectory": True, "consistency": 0.5}, 3, 3),
    ],
)
def test_passes_beside_the_training_pass(backbone, sample, values, num_levels, wanted):
    noise = with_process(**values)
    levels = LEVELS.clamp_max(num_levels)
    grid = timesteps(num_levels)
    assert passes(backbone, lambda: noisy_codes(backbone, sample, levels, grid, noise, rng())) == wanted
    clean = torch.zeros_like(levels)
    most = passes(backbone, lambda: noisy_codes(backbone, sample, clean, grid, noise, rng()))
    assert most == min(1, wanted), "where nothing is noisy, nothing moves"


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_the_training_pass_alone(sample, autocast):
    """Autocast keeps the weights it has cast: those of passes without gradients must not serve this one."""
    noise = TrainingNoise(trajectory=True, process=NoiseProcess(source="tied"))
    gradients = []
    for again in (False, True):
        backbone = tiny_chameleon(7, seed=2, scale=0.5)
        found = noisy_codes(backbone, sample, LEVELS, timesteps(3), noise, rng())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if again:
                noisy_codes(backbone, sample, LEVELS, timesteps(3), noise, rng())
            logits_of(backbone, sample, found).logsumexp(-1).sum().backward()
        named = {name: p.grad for name, p in backbone.named_parameters() if "model.model" in name}
        gradients.append({name: grad for name, grad in named.items() if grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("self_attn.q_proj" in name for name in gradients[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_values_that_do_not_go_together_are_named():
    assert TrainingNoise().problems() == []
    for values, key in (
        ({"state": "draft"}, "process.state=draft: needs drafts; set noise.trajectory to true"),
        ({"estimate": "expected"}, "process.estimate=expected: needs laws on the way; set noise.trajectory"),
        ({"t_min": 1.0}, "process.t_min=1.0: must lie in (0, 1)"),
        ({"consistency": 1.5}, "consistency=1.5: must lie in [0, 1]"),
        ({"num_levels": (3, 2)}, "num_levels=[3, 2]: must be [fewest, most]"),
        ({"val_levels": 0}, "val_levels=0: must be at least 1"),
        ({"ramp": RampLaw(segment=(0, 2))}, "ramp.segment=[0, 2]: must be [fewest, most]"),
    ):
        [line] = with_process(**values).problems()
        assert line.startswith(key)


def test_dry_passes_are_as_many_as_the_grid_asks_for_and_change_nothing(backbone, sample, monkeypatch):
    """Levels of one rank may need none of them; ranks that gather weights from each other must agree."""
    calls = []
    real = logits_of
    monkeypatch.setattr(states, "logits_of", lambda *given: calls.append(1) or real(*given))
    noise, clean = with_process(trajectory=True), torch.zeros_like(LEVELS)
    for levels, dry, passes in ((clean, False, 1), (clean, True, 3), (LEVELS, False, 3), (LEVELS, True, 3)):
        calls.clear()
        found = noisy_codes(backbone, sample, levels, timesteps(3), noise, rng(), dry)
        assert len(calls) == passes
        usual = noisy_codes(backbone, sample, levels, timesteps(3), noise, rng())
        assert torch.equal(found.states, usual.states)
