"""Batches of tasks other than images of codes: which are left, and in which order their methods come."""

from types import SimpleNamespace

from sjd2_lightning.evaluation.jobs import unfinished_batches
from sjd2_lightning.evaluation.prompts import PromptItem

PROMPTS = [PromptItem(f"problem-{number}", f"{number}+{number}", number) for number in range(5)]
METHODS = ["ar", "passes", "pause"]


def left(done: set[tuple[str, str]]) -> list[tuple[int, list[str], list[str]]]:
    records = [SimpleNamespace(method=method, key=key) for method, key in done]
    found = unfinished_batches(
        PROMPTS, METHODS, 2, SimpleNamespace(load=lambda: records), ("doing", "problems")
    )
    return [(number, [item.key for item in batch], order) for number, batch, order in found]


def test_a_batch_is_left_while_one_record_of_it_is_missing():
    whole = {(method, item.key) for method in METHODS for item in PROMPTS}
    assert left(whole) == []
    missing = {("pause", "problem-1"), ("ar", "problem-4")}
    assert [(number, keys) for number, keys, _ in left(whole - missing)] == [
        (0, ["problem-0", "problem-1"]),
        (2, ["problem-4"]),
    ]


def test_each_method_is_the_first_one_in_turn():
    orders = [order for _, _, order in left(set())]
    assert orders == [["ar", "passes", "pause"], ["passes", "pause", "ar"], ["pause", "ar", "passes"]]
