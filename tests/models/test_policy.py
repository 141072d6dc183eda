"""The policy as a backbone: all decoding methods and noisy states of codes apply to chunks of actions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from sjd2_lightning.cli.teacher import Drawing, drawn_samples
from sjd2_lightning.config.reading import evaluate_config
from sjd2_lightning.data.reading import Sample
from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.models.policy import ActionPolicy, PolicySizes, load_policy
from sjd2_lightning.training.noise import TrainingNoise
from sjd2_lightning.training.states import TeacherForced, logits_of, noisy_codes
from tests.decoding.variants.test_early_exit import SIZES, TEXTS, N, policy
from tests.tools.configurations import composed

SEEDS = list(range(len(TEXTS)))


def methods() -> dict[str, DecodingConfig]:
    """All methods of conf/method as they are, at the policy's length."""
    return evaluate_config(composed("evaluate", f"decoding.window={N}", "methods.ar.window=1")).methods


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_draws_chunks(name):
    model, method = policy(), methods()[name]
    plain = decode(model, TEXTS, SEEDS, DecodingConfig("ar", window=1), model.chunk)
    values = {**vars(method), "sampling": Sampling()}
    found = decode(model, TEXTS, SEEDS, DecodingConfig(**values), model.chunk)
    assert found.image_ids.shape == (4, 4, 3)
    assert found.image_ids.min() >= 0
    assert found.image_ids.max() < SIZES.num_bins
    assert (found.stats.nfe <= N + 2).all()
    if method.acceptance == "replay":
        assert torch.equal(found.slot_ids, plain.slot_ids)


def test_passes_with_a_cache_say_what_the_plain_forward_says():
    model, passes = policy(), []
    method = DecodingConfig("jacobi", window=N, acceptance="match", sampling=Sampling(0.0))
    found = decode(model, TEXTS, SEEDS, method, model.chunk, passes.append)
    numbers = [[int(word) for word in text.split()] for text in TEXTS]
    with torch.no_grad():
        logits = logits_of(model, TeacherForced(numbers, found.image_ids, model.chunk), None)
    assert torch.equal(logits.argmax(-1), found.slot_ids), "a fixed point"


def test_noisy_states_of_a_trajectory_are_made_for_it():
    model = policy()
    codes = torch.randint(0, SIZES.num_bins, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    sample = TeacherForced([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], codes, model.chunk)
    levels = torch.tensor([[0] * 4 + [1, 2] * 4] * 2)
    noise = TrainingNoise(trajectory=True)
    grid = noise.process.grid(2)
    found = noisy_codes(model, sample, levels, grid, noise, torch.Generator().manual_seed(0))
    assert found.states is not None
    assert torch.isfinite(logits_of(model, sample, found)).all()
    assert not torch.allclose(logits_of(model, sample, found), logits_of(model, sample, None))


def test_teacher_samples_are_drawn_for_it():
    model, own = policy(), torch.zeros(4, 3, dtype=torch.long)
    samples = [Sample(f"k{row}", text, own) for row, text in enumerate(TEXTS)]
    found = list(drawn_samples(model, samples, Drawing(Sampling(0.0)), (4, 3), lambda num: None))
    plain = DecodingConfig("ar", window=1, sampling=Sampling(0.0))
    drawn = decode(model, TEXTS, SEEDS, plain, model.chunk).image_ids
    assert all((row["image_ids"] == codes.numpy()).all() for row, codes in zip(found, drawn, strict=True))


def test_a_policy_is_read_back(tmp_path: Path):
    model = policy()
    model.save(tmp_path)
    again = load_policy(tmp_path)
    assert again.sizes == SIZES
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert_close(model.decode_images(torch.full((1, 4, 3), 11)), torch.ones(1, 3, 4, 3))
    (tmp_path / "policy.safetensors").write_bytes(b"cut off")
    other = json.dumps(dataclasses.asdict(SIZES) | {"width": 32})
    for folder, sizes in (
        (tmp_path, None),
        (tmp_path, other),
        (tmp_path, "{"),
        (tmp_path / "elsewhere", None),
    ):
        if sizes is not None:
            (folder / "policy.json").write_text(sizes)
        with pytest.raises(ValueError, match=r"no policy in .*; train one with experiment=ceed_teacher"):
            load_policy(folder)


def test_observations_and_sizes_that_do_not_fit_are_refused():
    model = policy()
    for text in ("", "1 2 3 4", "1 2 3 4 12", "1 2 3 4 x"):
        with pytest.raises(ValueError, match="is not 5 whole numbers below 12"):
            model.prompt_ids(text, model.chunk)
    with pytest.raises(ValueError, match="chunks of 4 steps x 3, not 3 x 4"):
        model.layout(3, 4)
    with pytest.raises(ValueError, match=r"sizes\.width=20: must be a multiple of head_width=16"):
        ActionPolicy(PolicySizes(width=20))
