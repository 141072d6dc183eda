"""An adapter that acts on noisy tokens alone: what is clean is computed by the weights as they were."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.evaluation.flops import pass_flops
from sjd2_lightning.models.lora import LoraSettings
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.training.batch import NoisyCodes
from sjd2_lightning.training.states import TeacherForced, logits_of
from tests.models.test_lora import trained
from tests.tools.tiny_backbones import NOISY_LEVELS, RAGGED_PROMPTS, tiny_chameleon
from tests.training.test_module import NOISE, Batch, module_of

SETTINGS = LoraSettings(rank=2, alpha=4.0)
GATED = replace(SETTINGS, noisy_only=True)
PIXELS = (12, 12)


@pytest.fixture
def gated():
    return trained(tiny_chameleon(5), GATED)


def hidden(backbone, noisy, seed=0):
    """Of six tokens."""
    embeddings = torch.randn(2, 6, backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        return backbone(embeddings, torch.arange(6).expand(2, -1), mask, noisy=noisy)


def test_clean_tokens_that_see_no_noise_have_the_bits_of_the_model_below(gated):
    plain, noisy = hidden(tiny_chameleon(5), None), torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(hidden(gated, None), plain)
    noisy[0, 3], noisy[1, 1] = True, True
    found = hidden(gated, noisy)
    assert torch.equal(found[0, :3], plain[0, :3])
    assert torch.equal(found[1, :1], plain[1, :1])
    for row, first in ((0, 3), (1, 1)):  # behind it everything sees the noisy token
        assert ((found[row, first:] - plain[row, first:]).abs().amax(-1) > 1e-3).all()
    assert torch.equal(hidden(gated, None), plain), "a pass leaves nothing behind"


def test_noisy_tokens_alone_are_those_of_an_adapter_of_all(gated):
    whole = trained(tiny_chameleon(5), SETTINGS)
    assert torch.equal(hidden(gated, torch.ones(2, 6, dtype=torch.bool)), hidden(whole, None))


def test_each_token_of_a_layer_is_gated_by_itself(gated):
    layer = gated.trunk.layers[0].mlp.up_proj
    x = torch.randn(2, 6, layer.in_features, generator=torch.Generator().manual_seed(3))
    noisy = torch.rand(2, 6, generator=torch.Generator().manual_seed(4)) < 0.5
    gated.noise_gate.open_for(noisy)
    below = layer.base_layer(x)
    update = (
        layer.scaling["default"] * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    )
    assert torch.allclose(layer(x), torch.where(noisy[..., None], below + update, below), atol=1e-6)


def noise_of(levels=NOISY_LEVELS) -> NoisyCodes:
    eps = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(5))
    return NoisyCodes(torch.tensor(levels), torch.linspace(0, 1, 4), eps)


def sample_of(backbone) -> TeacherForced:
    layout = backbone.layout(6, 4)
    codes = torch.randint(5, (4, 3, 2), generator=torch.Generator().manual_seed(6))
    return TeacherForced([backbone.prompt_ids(prompt, layout) for prompt in RAGGED_PROMPTS], codes, layout)


def test_training_sees_noise_through_it_and_clean_codes_without(gated):
    plain, sample = tiny_chameleon(5), sample_of(gated)
    with torch.no_grad():
        assert torch.equal(logits_of(gated, sample, None), logits_of(plain, sample, None))
        ours, theirs = logits_of(gated, sample, noise_of()), logits_of(plain, sample, noise_of())
    levels = torch.tensor(NOISY_LEVELS)
    reached = (levels.cumsum(1) - levels) > 0  # noise lies left of what the code is drawn at
    assert torch.equal(ours[~reached], theirs[~reached])
    assert ((ours - theirs).abs().amax(-1)[reached] > 1e-4).all()


def test_gradients_come_from_noisy_codes_and_a_clean_batch_has_none(gated):
    sample = sample_of(gated)
    parameters = [p for p in gated.parameters() if p.requires_grad]
    for noise, any_moves in ((None, False), (noise_of(), True)):
        loss = logits_of(gated, sample, noise).logsumexp(-1).sum()
        gradients = torch.autograd.grad(loss, parameters)
        assert any(bool(gradient.any()) for gradient in gradients) is any_moves


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_a_batch_that_is_clean_throughout_can_be_trained_on(gated):
    clean = replace(NOISE, ramp=replace(NOISE.ramp, clean_share=1.0))
    module_of(clean, gated, image_size=(6, 4)).training_step(
        Batch(list(RAGGED_PROMPTS), sample_of(gated).image_ids), 0
    ).backward()
    assert not any(bool(p.grad.any()) for p in gated.parameters() if p.requires_grad)


def test_a_layer_that_is_computed_again_has_the_gate_of_its_pass(gated):
    """Passes without gradients may come before the backward pass: those of the corrector do."""
    sample = sample_of(gated)
    parameters = [p for p in gated.parameters() if p.requires_grad]
    for noise in (None, noise_of()):
        found = []
        for again in (False, True):
            if again:
                gated.checkpoint_activations()
            gated.train()
            loss = logits_of(gated, sample, noise).logsumexp(-1).sum()
            with torch.no_grad():
                logits_of(gated, sample, noise_of(((3,) * 6,) * 4))
                logits_of(gated, sample, None)
            found.append(torch.autograd.grad(loss, parameters))
            gated.model.gradient_checkpointing_disable()
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


def test_training_without_noise_is_refused(gated):
    with pytest.raises(ValueError, match=r"noise\.enabled=false: .* would learn nothing"):
        module_of(replace(NOISE, enabled=False), gated)


METHODS = {
    "one level": DecodingConfig("sjd2", window=8, num_levels=1),
    "three levels": DecodingConfig("sjd2", window=8, num_levels=3),
    "invariant": DecodingConfig("sjd2", window=8, num_levels=1, invariant=True),
    "with guidance": DecodingConfig("sjd2", window=8, num_levels=2, sampling=Sampling(guidance_scale=2.0)),
}


def drawn(backbone, method):
    return decode(backbone, RAGGED_PROMPTS[:2], [3, 4], method, backbone.layout(*PIXELS))


@pytest.mark.parametrize("name", METHODS)
def test_replay_draws_what_the_model_below_draws(gated, name):
    method = METHODS[name]
    plain = tiny_chameleon(5)
    ar = drawn(plain, DecodingConfig("ar", window=1, sampling=method.sampling, invariant=method.invariant))
    found = drawn(gated, method)
    assert torch.equal(found.slot_ids, ar.slot_ids)
    assert torch.equal(
        drawn(gated, DecodingConfig("ar", window=1, sampling=method.sampling)).slot_ids, ar.slot_ids
    )


def seen_of(backbone, method):
    """Scores of every pass."""
    passes = []
    decode(
        backbone,
        RAGGED_PROMPTS[:1],
        [3],
        method,
        backbone.layout(*PIXELS),
        lambda it: passes.append(it.scores.clone()),
    )
    return passes


def differences(method):
    """The largest differences of scores: between both ways to run layers, and from the model below."""
    ours, eager = (seen_of(trained(tiny_chameleon(5), GATED), way) for way in (method, METHODS["one level"]))
    plain = seen_of(tiny_chameleon(5), METHODS["one level"])
    assert len(ours) == len(eager)
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, eager, strict=True))
    return apart, float((eager[0] - plain[0]).abs().max())


def test_invariant_layers_gate_alike():
    apart, from_plain = differences(METHODS["invariant"])
    assert apart < 1e-4
    assert from_plain > 1e-2


@pytest.mark.slow
def test_compiled_layers_gate_alike(repo):
    """Where types are not checked, since the compiler cannot read such functions."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.models.test_noise_gate"], capture_output=True, text=True, cwd=repo
    )
    assert run.returncode == 0, run.stderr[-3000:]
    apart, from_plain = json.loads(run.stdout.splitlines()[-1])
    assert apart < 1e-4
    assert from_plain > 1e-2


def test_a_folder_holds_the_weights_below_and_the_adapter_beside_them(gated, tmp_path):
    gated.save(tmp_path)
    plain = tiny_chameleon(5)
    again = load_backbone("chameleon", tmp_path).eval()
    noisy = torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(hidden(again, noisy), hidden(gated, noisy))
    assert torch.equal(hidden(again, None), hidden(plain, None))
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["noisy_only"] == "true"
    below = load_file(tmp_path / "trunk" / "model.safetensors")
    assert all(
        torch.equal(value, below[name]) for name, value in plain.model.state_dict().items() if name in below
    )
    again.save(tmp_path / "twice")
    assert torch.equal(
        hidden(load_backbone("chameleon", tmp_path / "twice").eval(), noisy), hidden(gated, noisy)
    )


def test_an_export_leaves_no_adapter_of_what_lay_there_before(gated, tmp_path):
    gated.save(tmp_path)
    tiny_chameleon(5).save(tmp_path)
    assert load_backbone("chameleon", tmp_path).noise_gate is None


def test_its_operations_are_counted_where_tokens_may_be_noisy(gated):
    plain = tiny_chameleon(5)
    assert pass_flops(gated, 4, 8) == pass_flops(plain, 4, 8)
    maps = [one for one in gated.modules() if hasattr(one, "lora_B")]
    more = sum(2 * 2 * (one.in_features + one.out_features) for one in maps)  # rank 2, a product is two
    assert pass_flops(gated, 4, 8, noisy=True) == pass_flops(plain, 4, 8) + 4 * more


def test_the_adapter_alone_knows_what_it_acts_on(gated, tmp_path):
    gated.save(tmp_path)
    other = tiny_chameleon(5)
    other.add_lora(SETTINGS, tmp_path / "adapter")
    noisy = torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(hidden(other, noisy), hidden(gated, noisy))
    assert torch.equal(hidden(other, None), hidden(tiny_chameleon(5), None))


def test_a_second_adapter_is_refused(gated, tmp_path):
    gated.save(tmp_path)
    with pytest.raises(ValueError, match="takes no second one; set both to null, or"):
        load_backbone("chameleon", tmp_path).add_lora(SETTINGS)


def test_a_copied_model_has_a_gate_of_its_own(gated):
    noisy = torch.ones(2, 6, dtype=torch.bool)
    wanted = hidden(gated, noisy)
    hidden(gated, None)  # the adapter is shut when the copy is made
    copied = copy.deepcopy(gated)
    assert torch.equal(hidden(copied, noisy), wanted)
    assert gated.noise_gate.noisy is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_below_in_int8_draws_what_it_draws_without_the_adapter(gated):
    pytest.importorskip("torchao")
    plain = tiny_chameleon(5)
    for backbone in (plain, gated):
        backbone.quantize("int8", "cpu")
    ar, sjd2 = DecodingConfig("ar", window=1), METHODS["one level"]
    assert torch.equal(drawn(gated, sjd2).slot_ids, drawn(plain, ar).slot_ids)
    assert gated.trunk.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32
    apart = (seen_of(gated, sjd2)[0] - seen_of(plain, sjd2)[0]).abs().max()
    assert apart > 1e-2, "the adapter acts"


if __name__ == "__main__":
    print(json.dumps(differences(replace(METHODS["one level"], engine="compiled"))))
