"""Ways of thinking: what is refused, and what a table says of each."""

from dataclasses import replace

from sjd2_lightning.data.sources.arithmetic import ProblemSource
from sjd2_lightning.evaluation.thought_methods import ThoughtEvaluation, ThoughtMethod
from sjd2_lightning.fixed_point import Schedule

CHAIN = ThoughtMethod(schedule=Schedule(window=1))
WHOLE = ThoughtEvaluation("weights", {"ar": CHAIN, "pause": ThoughtMethod("pause")}, ("ar",), ProblemSource())


def test_a_baseline_is_the_chain_and_is_compared():
    assert WHOLE.problems() == []
    (line,) = replace(WHOLE, ways={"ar": ThoughtMethod()}).problems()
    assert line == "ways.ar.schedule.window=0: must be 1; others are compared with the chain"
    (line,) = replace(WHOLE, ways={"ar": ThoughtMethod("pause")}).problems()
    assert line == "ways.ar.kind=pause: must be latents; others are compared with the chain"
    assert "ways: leave ar in; others are compared with the chain" in replace(WHOLE, ways={}).problems()
    assert replace(WHOLE, compare=("pause",)).problems() == [
        "compare=['pause']: leave ar in; all are compared with it"
    ]
    (line,) = replace(WHOLE, compare=("ar", "cot")).problems()
    assert line == "compare: unknown way 'cot'; there are ar, pause"


def test_values_inside_are_named():
    ways = {"ar": CHAIN, "a b": replace(CHAIN, schedule=Schedule(segments=0))}
    found = replace(WHOLE, ways=ways, source=ProblemSource(1), answer_tokens=0).problems()
    assert "ways.a b: letters, digits and _ name a method" in found
    assert "ways.a b.schedule.segments=0: must be at least 1" in found
    assert "source.num_operations=1: must be at least 2" in found
    assert "answer_tokens=0: must be at least 1" in found


def test_what_a_table_says():
    ways = {
        "loop": CHAIN,
        "tolerance": ThoughtMethod(),
        "passes": ThoughtMethod(schedule=Schedule(max_passes=3)),
        "pause": ThoughtMethod("pause"),
    }
    assert [way.acceptance for way in ways.values()] == list(ways)
    assert [way.lossless for way in ways.values()] == [True, True, False, False]
    assert not replace(CHAIN, weights="other").lossless
    assert [way.size for way in ways.values()] == [1, 0, 0, 0]
