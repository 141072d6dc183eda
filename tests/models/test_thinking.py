"""Thinking in latents: passes against the chain, pause tokens, gradients, padding, words; broken rules."""

import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch

from sjd2_lightning.fixed_point import Schedule
from sjd2_lightning.models import thinking
from sjd2_lightning.models.thinker import ThinkerSizes, ThoughtSettings, build_thinker
from sjd2_lightning.models.thinking import answers_of, continued, explained, read, solved, think

NUM_LATENTS = 6
QUESTIONS = ["3+4*2 mod 5", "1", "22-1 mod 7"]
SIZES = ThinkerSizes(width=32, num_layers=2, num_heads=2, num_positions=64)
SETTINGS = ThoughtSettings(NUM_LATENTS, 3, answer_prompt="A:")


def thinker(family="gpt2", projection="none", seed=0):
    """A model with random weights."""
    torch.manual_seed(seed)
    return build_thinker(replace(SIZES, family=family), replace(SETTINGS, projection=projection)).eval()


KINDS = [("gpt2", "none"), ("llama", "none"), ("gpt2", "mlp"), ("gpt2", "scale")]


def keys_of(thought):
    """Keys and values of all columns, (2 layers, B, heads, P, head width)."""
    return torch.stack([part for layer in thought.past.layers for part in layer])


def chain(model, questions=QUESTIONS):
    """The sequential chain written out: one latent at a time, nothing of it by a fixed point."""
    past, latent, pause = read(model, questions, 0)
    hidden = [pause.hidden]
    for _ in range(NUM_LATENTS):
        fed = model.feed(latent, past)
        past, latent = fed.past, model.project(fed.hidden)
        hidden.append(fed.hidden)
    return thinking.Thought(past, torch.cat(hidden, dim=1))


def gap(one, other):
    return max(
        float((one.hidden - other.hidden).abs().max()), float((keys_of(one) - keys_of(other)).abs().max())
    )


@pytest.mark.parametrize(("family", "projection"), KINDS)
@torch.no_grad()
def test_as_many_passes_as_latents_are_the_chain(family, projection):
    model = thinker(family, projection)
    wanted = chain(model)
    for found in (
        think(model, QUESTIONS, NUM_LATENTS, NUM_LATENTS),
        solved(model, QUESTIONS, NUM_LATENTS, Schedule(window=1)),
        solved(model, QUESTIONS, NUM_LATENTS, Schedule(max_passes=NUM_LATENTS, tolerance=0)),
        solved(model, QUESTIONS, NUM_LATENTS, Schedule(tolerance=0)),
        solved(model, QUESTIONS, NUM_LATENTS, Schedule(window=3, tolerance=0)),
        solved(model, QUESTIONS, NUM_LATENTS, Schedule(segments=2, tolerance=0)),
    ):
        assert gap(found, wanted) < 1e-5
    for num_passes in range(NUM_LATENTS - 1):
        assert gap(think(model, QUESTIONS, NUM_LATENTS, num_passes), wanted) > 1e-2, (
            "fewer passes are another thought"
        )


@torch.no_grad()
def test_passes_by_a_schedule_are_those_of_training():
    model = thinker()
    for num_passes in range(1, NUM_LATENTS):
        found = solved(model, QUESTIONS, NUM_LATENTS, Schedule(max_passes=num_passes, tolerance=0))
        assert gap(found, think(model, QUESTIONS, NUM_LATENTS, num_passes)) < 1e-5
        committed = found.solution.stats.committed[:, 0].tolist()
        assert committed == [1] * (num_passes - 1) + [NUM_LATENTS - num_passes + 1]


@torch.no_grad()
def test_no_pass_is_pause_tokens():
    model = thinker()
    found = think(model, QUESTIONS, NUM_LATENTS, 0)
    for row, question in enumerate(QUESTIONS):
        text = model.embed(torch.tensor([model.ids([question])[0]]))
        columns = torch.cat([text, model.mark("bot", 1), model.mark("latent", 1, NUM_LATENTS)], dim=1)
        plain = model.trunk(inputs_embeds=columns).last_hidden_state[0, -NUM_LATENTS - 1 :]
        torch.testing.assert_close(found.hidden[row], plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_passes", [0, 3, NUM_LATENTS])
@torch.no_grad()
def test_rows_of_a_padded_batch_are_the_rows_alone(num_passes):
    model = thinker()
    together = think(model, QUESTIONS, NUM_LATENTS, num_passes)
    answers = ["4", "12", ""]
    fed, ids, _ = continued(model, together, answers)
    for row, question in enumerate(QUESTIONS):
        alone = think(model, [question], NUM_LATENTS, num_passes)
        torch.testing.assert_close(together.hidden[row], alone.hidden[0], rtol=0, atol=1e-5)
        own, own_ids, _ = continued(model, alone, answers[row : row + 1])
        assert ids[row, : own_ids.shape[1]].tolist() == own_ids[0].tolist()
        first = fed.hidden.shape[1] - ids.shape[1]
        torch.testing.assert_close(
            fed.hidden[row, : first + own_ids.shape[1]], own.hidden[0], rtol=0, atol=1e-5
        )
    assert answers_of(model, together, 3) == [
        answers_of(model, think(model, [q], NUM_LATENTS, num_passes), 3)[0] for q in QUESTIONS
    ]


def gradients(model, thought):
    """Gradients of an answer's scores in all weights."""
    model.zero_grad()
    fed, ids, _ = continued(model, thought, ["4", "1", "2"])
    model.logits(fed.hidden[:, -ids.shape[1] :]).square().mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("family", "projection"), KINDS)
def test_gradients_of_all_passes_are_those_of_the_chain(family, projection):
    model = thinker(family, projection).double()
    close = partial(
        torch.testing.assert_close, rtol=1e-5, atol=1e-5
    )  # Llama's norms are in float32 all the same
    wanted = gradients(model, chain(model))

    def unrolled(num_passes):
        past, guess, pause = read(model, QUESTIONS, NUM_LATENTS)
        latents = thinking.Latents(model, past, NUM_LATENTS, pause.hidden[:, :1])
        thinking.unroll(latents, guess, num_passes)
        return gradients(model, thinking.Thought(latents.past, latents.hidden))

    for num_passes in (NUM_LATENTS, NUM_LATENTS + 2):
        found = unrolled(num_passes)
        close(found["marks"][[0, 2]], wanted["marks"][[0, 2]])
        for name in wanted.keys() - {"marks"}:
            close(found[name], wanted[name], msg=name)
    short = unrolled(2)
    assert any(not torch.allclose(short[name], wanted[name]) for name in wanted)
    close(gradients(model, think(model, QUESTIONS, NUM_LATENTS, NUM_LATENTS)), wanted)


@torch.no_grad()
def test_words_are_split_at_the_answer_prompt(monkeypatch):
    model = thinker()
    said = model.ids(["<<1+2=3>>A:4"])[0]
    monkeypatch.setattr(thinking, "_greedy", lambda *given: [said, model.ids(["no end"])[0]])
    found, lost = explained(model, QUESTIONS[:2], 20)
    assert found == thinking.Explained("<<1+2=3>>", model.ids(["4"])[0], len(said) - 1)
    assert lost == thinking.Explained("no end", [], 6)


@torch.no_grad()
def test_words_are_what_the_library_generates():
    model = thinker(seed=3)
    found = explained(model, QUESTIONS[:1], 12)[0]
    ids = torch.tensor([model.ids([QUESTIONS[0]])[0]])
    wanted = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=model.end
    )
    said = model.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert said == found.steps + model.text(found.answer_ids)


# Each mutation of the map that the tests above must see.
MUTATIONS = {
    "reads what it fed before": ("self.past.cut(self.num_read + first)", "self.past"),
    "forgets a column": (
        "self.past.cut(self.num_read + first)",
        "self.past.cut(self.num_read + max(first - 1, 0))",
    ),
    "keeps the question alone": ("self.past = out.past", "pass"),
    "keeps no order": ("self.hidden[:, : first + 1], out.hidden", "out.hidden, self.hidden[:, : first + 1]"),
}


@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_mutations_are_seen(name, monkeypatch):
    old, new = MUTATIONS[name]
    source = inspect.getsource(thinking.Latents)
    assert old in source
    scope = dict(vars(thinking))
    exec(source.replace(old, new), scope)
    monkeypatch.setattr(thinking, "Latents", scope["Latents"])
    model = thinker()
    wanted = chain(model)
    schedules = [Schedule(window=1), Schedule(tolerance=0)]
    found = [think(model, QUESTIONS, NUM_LATENTS, NUM_LATENTS)]
    found += [solved(model, QUESTIONS, NUM_LATENTS, schedule) for schedule in schedules]
    seen = [
        own.hidden.shape != wanted.hidden.shape
        or keys_of(own).shape != keys_of(wanted).shape
        or gap(own, wanted) > 1e-3
        for own in found
    ]
    assert any(seen)
