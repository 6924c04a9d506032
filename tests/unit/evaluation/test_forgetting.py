import pytest

from r1ray.evaluation.accuracy import Answer
from r1ray.evaluation.forgetting import compare, find_forgotten, render_changes


def _answers(**correct: list[bool]) -> list[Answer]:
    return [
        Answer(family, f"{family} {at}", "1", "1", is_correct, is_correct)
        for family, items in correct.items()
        for at, is_correct in enumerate(items)
    ]


OLD = _answers(sums=[True] * 8 + [False] * 2, words=[True] * 10, legs=[False] * 10)
NEW = _answers(sums=[True] * 9 + [False], words=[False] + [True] * 9, legs=[True] * 10)


def test_families_are_compared_problem_by_problem() -> None:
    sums, words, legs = compare(OLD, NEW, taught={"sums", "words"})
    assert [item.family for item in (sums, words, legs)] == ["sums", "words", "legs"]
    assert [item.was_taught for item in (sums, words, legs)] == [True, True, False]
    assert (sums.old.value, sums.new.value) == (0.8, 0.9)
    assert sums.change[0] == pytest.approx(0.1)
    assert words.change[0] == pytest.approx(-0.1)
    low, high = words.change[1:]
    assert low < -0.1 < high <= 0.0
    assert legs.change == (1.0, 1.0, 1.0)


def test_what_lost_more_than_the_margin_is_forgotten() -> None:
    changes = compare(OLD, NEW, taught={"sums", "words"})
    assert [item.family for item in find_forgotten(changes, 9.9)] == ["words"]
    assert find_forgotten(changes, 10.0) == []  # that much is allowed
    table = render_changes(changes, 3.0).splitlines()
    assert table[2].startswith("| sums | taught before | 80.0% | 90.0% | +10.0 ")
    assert table[3].endswith("of 10 problems | **forgotten** |")
    assert table[4].startswith("| legs | new | 0.0% | 100.0% | +100.0 ")
