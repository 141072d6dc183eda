"""The training module: its losses against plain ones, its randomness, and that it learns."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.noise import NoiseProcess
from sjd2_lightning.training.module import SJD2Module, TrainingNoise
from sjd2_lightning.training.noise import RampLaw
from sjd2_lightning.training.optimizer import OptimizerConfig
from sjd2_lightning.training.states import TeacherForced, logits_of
from tests.tools.tiny_backbones import tiny_chameleon

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")  # no trainer here


class Batch(NamedTuple):
    """What training reads of a batch."""

    captions: list[str]
    image_ids: torch.Tensor


CAPTIONS = ["red cat", "dog on a green mat", "blue", "a red dog on a blue cat"]
NOISE = TrainingNoise(
    num_levels=(1, 3), val_levels=2, ramp=RampLaw(clean_run=(1, 2), segment=(1, 2), top_run=(0, 2))
)
OFF = replace(NOISE, enabled=False)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def batch_of(seed: int = 0) -> Batch:
    return Batch(CAPTIONS, torch.randint(7, (4, 3, 3), generator=torch.Generator().manual_seed(seed)))


def module_of(noise: TrainingNoise = NOISE, backbone: Backbone | None = None, **values) -> SJD2Module:
    optimizer = OptimizerConfig(lr=2e-2, warmup_steps=3, freeze=values.pop("freeze", ()))
    settings = {"image_size": (6, 6), "seed": 1, **values}
    return SJD2Module(backbone or tiny_chameleon(7, seed=4, scale=0.3), noise, optimizer, **settings)


def loader(batches: list[Batch]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def validate(module: SJD2Module, batches: list[Batch]) -> dict[str, float]:
    """What a validation logs."""
    return dict(L.Trainer(**QUIET).validate(module, loader(batches), verbose=False)[0])


def train(module: SJD2Module, num_steps: int, batch: Batch | None = None, **values) -> L.Trainer:
    """Runs Lightning's own loop on one batch, again and again, and then a validation."""
    trainer = L.Trainer(
        max_steps=num_steps,
        **QUIET,
        **values,
    )
    batch = batch or batch_of()
    trainer.fit(module, loader([batch] * num_steps), loader([batch]))
    return trainer


def by_transformers(module: SJD2Module, batch: Batch, unconditional: bool = False) -> torch.Tensor:
    """Losses (B, n) by transformers' trunk over token ids, a row at a time."""
    backbone, rows = module.backbone, []
    for caption, image in zip(batch.captions, batch.image_ids.tolist(), strict=True):
        layout = module.image_layout
        ids = backbone.unconditional_ids(layout) if unconditional else backbone.prompt_ids(caption, layout)
        targets, places = [], []
        for line in image:
            for code in line:
                places.append(len(ids) - 1)
                ids = [*ids, 4 + code]
                targets.append(code)
            ids = [*ids, backbone.tokens.newline]
        with torch.no_grad():
            hidden = backbone.model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            law = backbone.model.lm_head(hidden[places])[:, 4:11].log_softmax(-1)
        rows.append(-law[range(len(targets)), targets])
    return torch.stack(rows)


def test_noise_off_is_the_cross_entropy_of_transformers_trunk():
    module, batch = module_of(OFF, prompt_dropout=0.0), batch_of()
    wanted = by_transformers(module, batch)
    prompts = module._prompts(batch.captions, None)
    assert torch.allclose(module.losses(batch, prompts, None).per_token, wanted, atol=1e-5)
    assert torch.allclose(module.training_step(batch, 0), wanted.mean(), atol=1e-5)


def test_noise_off_is_plain_torch_bit_for_bit():
    """Trunk and head called by hand on the same left-padded embeddings, then `cross_entropy`."""
    module, batch = module_of(OFF, prompt_dropout=0.0), batch_of()
    backbone, layout = module.backbone, module.image_layout
    prompts = [backbone.prompt_ids(caption, layout) for caption in CAPTIONS]
    width = max(map(len, prompts))
    slots = F.pad(4 + batch.image_ids, (0, 1), value=backbone.tokens.newline).flatten(1)[:, :-2]
    rows = zip(prompts, slots.tolist(), strict=True)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt + row for prompt, row in rows])
    starts = torch.tensor([width - len(prompt) for prompt in prompts])
    columns = torch.arange(ids.shape[1])
    causal = torch.ones(len(columns), len(columns)).tril().bool()
    mask = (causal & (columns >= starts[:, None, None])) | torch.eye(len(columns)).bool()
    hidden = backbone.model.model(
        inputs_embeds=backbone.model.model.embed_tokens(ids),
        position_ids=(columns - starts[:, None]).clamp_min(0),
        attention_mask=mask[:, None],
        use_cache=False,
    ).last_hidden_state
    places = [width - 1 + slot for slot, forced in enumerate(layout.forced) if forced < 0]
    logits = F.linear(hidden[:, places], backbone.model.lm_head.weight[4:11])
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.image_ids.flatten(), reduction="none")
    assert torch.equal(module.losses(batch, prompts, None).per_token.flatten(), wanted)
    assert torch.equal(module.training_step(batch, 0), wanted.mean())


def test_all_clean_levels_are_noise_off_bit_for_bit():
    clean = replace(NOISE, ramp=replace(NOISE.ramp, clean_share=1.0))
    for step in range(3):
        losses = [module_of(noise).training_step(batch_of(), step) for noise in (clean, OFF)]
        assert torch.equal(*losses)
    gradients = []
    for noise in (clean, OFF):
        module = module_of(noise)
        module.training_step(batch_of(), 0).backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_noise_changes_the_loss_and_the_target_stays_clean(monkeypatch):
    module = module_of()
    seen = []
    losses = module.losses

    def spy(batch, prompts, noise):
        result = losses(batch, prompts, noise)
        seen.append((batch.image_ids, noise, result))
        return result

    monkeypatch.setattr(module, "losses", spy)
    batch = batch_of()
    for step in range(30):
        loss = module.training_step(batch, step)
        ids, noise, result = seen[-1]
        assert torch.equal(ids, batch.image_ids)
        assert torch.equal(loss, result.per_token.mean())
        assert noise.levels.max() <= len(noise.timesteps) - 1
        assert noise.eps.shape == (4, 9, module.backbone.hidden_size)
    assert {len(noise.timesteps) - 1 for _, noise, _ in seen} == {1, 2, 3}, "the grid is drawn per batch"
    assert not torch.equal(seen[0][2].total, module_of(OFF).training_step(batch, 0))


def test_random_grids_in_training_and_the_schedule_in_validation(monkeypatch):
    module, seen = module_of(replace(NOISE, random_grid=True)), []
    losses = module.losses

    def spy(batch, prompts, noise):
        seen.append(None if noise is None else noise.timesteps)
        return losses(batch, prompts, noise)

    monkeypatch.setattr(module, "losses", spy)
    for step in range(20):
        module.training_step(batch_of(), step)
    inner = [tuple(grid[1:-1].tolist()) for grid in seen if len(grid) > 2]
    assert len(inner) > 5
    assert len(set(inner)) == len(inner), "a grid of its own for every batch"
    seen.clear()
    validate(module, [batch_of()])
    assert torch.equal(seen[-1], torch.tensor([0, 0.5, 1]))


@pytest.mark.parametrize(
    "values",
    [
        {"process": NoiseProcess(source="tied")},
        {"process": NoiseProcess(source="mean")},
        {"trajectory": True, "process": NoiseProcess(state="draft"), "random_grid": True},
        {"trajectory": True, "process": NoiseProcess(state="draft"), "mark_drafts": False},
        {"trajectory": True, "process": NoiseProcess(source="mean", estimate="expected")},
        {"consistency": 0.5},
    ],
)
def test_every_variant_learns(values):
    module = module_of(replace(NOISE, **values), prompt_dropout=0.0)
    before = validate(module, [batch_of()])
    train(module, 60)
    after = validate(module, [batch_of()])
    for band in ("clean", "high"):
        assert after[f"val/loss_{band}"] < 0.7 * before[f"val/loss_{band}"], band


def test_the_own_law_is_a_target_behind_noise_alone(monkeypatch):
    """Codes with nothing noisy to their left keep the true code; validation knows no other target."""
    noise = replace(NOISE, consistency=1.0)
    told, plain = module_of(noise, prompt_dropout=0.0), module_of(prompt_dropout=0.0)
    seen = []
    for module in (told, plain):

        def spy(batch, prompts, noise, losses=module.losses):
            seen.append((noise, losses(batch, prompts, noise).per_token.detach()))
            return losses(batch, prompts, noise)

        monkeypatch.setattr(module, "losses", spy)
        module.training_step(batch_of(), 0)
    (noise, ours), (same, theirs) = seen
    assert torch.equal(noise.levels, same.levels)
    assert torch.equal(noise.eps, same.eps)
    behind = noise.reaches()
    assert 0 < behind.sum() < behind.numel()
    assert torch.equal(ours[~behind], theirs[~behind])
    wanted = -(noise.clean_law.exp() * told_logits(told, noise).log_softmax(-1)).sum(-1)
    assert torch.allclose(ours[behind], wanted[behind], atol=1e-5)
    assert validate(told, [batch_of()]) == validate(plain, [batch_of()])


def told_logits(module: SJD2Module, noise) -> torch.Tensor:
    """What a module says of a batch with this noise."""
    prompts = module._prompts(CAPTIONS, None)
    return logits_of(
        module.backbone, TeacherForced(prompts, batch_of().image_ids, module.image_layout), noise
    )


def test_choices_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"noise\.process\.state=draft: needs drafts"):
        module_of(replace(NOISE, process=NoiseProcess(state="draft")))
    with pytest.raises(ValueError, match=r"noise\.mark_drafts=False: .* set noise\.process\.state to draft"):
        module_of(replace(NOISE, trajectory=True, mark_drafts=False))


def test_randomness_belongs_to_seed_and_step():
    def losses(seed):
        module = module_of(seed=seed)
        return [module.training_step(batch_of(), step).item() for step in range(4)]

    torch.manual_seed(1)
    first = losses(5)
    torch.manual_seed(2)  # the global generator plays no part
    assert losses(5) == first
    assert losses(6) != first
    assert len(set(first)) == 4


def test_prompts_are_dropped_at_their_share(monkeypatch):
    module = module_of(OFF, prompt_dropout=0.3)
    seen = []
    losses = module.losses

    def spy(batch, prompts, noise):
        seen.extend(prompts)
        return losses(batch, prompts[:1], noise)

    monkeypatch.setattr(module, "losses", spy)
    batch = Batch(["red cat"] * 1000, torch.zeros(1, 3, 3, dtype=torch.long))
    for step in range(4):
        module.training_step(batch, step)
    layout = module.image_layout
    empty, full = module.backbone.unconditional_ids(layout), module.backbone.prompt_ids("red cat", layout)
    assert all(prompt in (empty, full) for prompt in seen)
    share = sum(prompt == empty for prompt in seen) / len(seen)
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / len(seen)) ** 0.5
    assert (seen[:1000] == seen[1000:2000]) is False


def test_a_dropped_prompt_gives_the_unconditional_loss():
    module, batch = module_of(OFF, prompt_dropout=1.0), batch_of()
    wanted = by_transformers(module, batch, unconditional=True).mean()
    assert torch.allclose(module.training_step(batch, 0), wanted, atol=1e-5)


def test_training_lowers_the_loss_clean_and_noisy():
    module = module_of(prompt_dropout=0.0)
    before = validate(module, [batch_of()])
    train(module, 60)
    after = validate(module, [batch_of()])
    for band in ("clean", "low", "high"):
        assert after[f"val/loss_{band}"] < 0.7 * before[f"val/loss_{band}"], band


def test_frozen_parts_stay_and_others_move():
    module = module_of(freeze=("model.model.embed_tokens", "model.lm_head"))
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    train(module, 3)
    after = module.backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "embed_tokens" in name or "lm_head" in name]
    assert not [name for name in moved if "image_tokenizer" in name or "vqmodel" in name]
    assert any("layers.0.self_attn" in name for name in moved)
    assert any("layers.1.mlp" in name for name in moved)


def test_the_image_tokenizer_is_never_trained():
    module = module_of()
    before = module.backbone.image_tokenizer.identity
    train(module, 2)
    assert module.backbone.image_tokenizer.identity == before


def test_validation_logs_loss_by_level(monkeypatch):
    """Clean equals plain autoregression; the bands are means over the codes behind such levels, by hand."""
    module, seen = module_of(), []
    losses = module.losses

    def spy(batch, prompts, noise):
        result = losses(batch, prompts, noise)
        seen.append((noise, result.per_token.detach()))
        return result

    batches = [batch_of(0), batch_of(1), batch_of(2)]
    monkeypatch.setattr(module, "losses", spy)
    logged = validate(module, batches)
    clean = torch.stack([by_transformers(module, batch).mean() for batch in batches]).mean()
    assert logged["val/loss_clean"] == pytest.approx(float(clean), abs=1e-5)
    bands: dict[str, list[float]] = {"low": [], "high": []}
    for noise, per_token in seen:
        if noise is None:
            continue
        for levels, values in zip(noise.levels.tolist(), per_token.tolist(), strict=True):
            for before, value in zip(levels, values[1:], strict=False):
                if before:
                    bands["high" if before == 2 else "low"].append(value)
    for band, values in bands.items():
        assert logged[f"val/loss_{band}"] == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert validate(module, batches) == logged, "validation noise is fixed"


@pytest.mark.parametrize("val_levels", [1, 5])
def test_a_band_without_a_code_does_not_spoil_the_others(val_levels):
    """With one level nothing is low, and short images may never reach the top: no number is a NaN."""
    module = module_of(replace(NOISE, val_levels=val_levels))
    logged = validate(module, [batch_of(seed) for seed in range(5)])
    assert "val/loss_clean" in logged
    assert all(torch.isfinite(torch.tensor(value)) for value in logged.values()), logged


def test_warm_up_and_decay():
    module = module_of()
    rates = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    train(module, 20, callbacks=[Watch()])
    peak = 2e-2
    assert rates[:3] == pytest.approx([peak / 3, peak * 2 / 3, peak])
    assert rates[3] == pytest.approx(peak)
    assert all(late <= early for early, late in pairwise(rates[3:]))
    assert 0.05 * peak <= rates[-1] < 0.1 * peak


def test_gains_and_biases_are_not_decayed():
    module = module_of()
    trainer = train(module, 1)
    groups = trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim <= 1 for p in groups[1]["params"])
    trained = {p for group in groups for p in group["params"]}
    assert trained == {p for p in module.parameters() if p.requires_grad}
