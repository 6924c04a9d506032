"""Judging replies and the intervals around shares."""

import pytest

from r1ray.config.prepare import FamilyConfig, TasksConfig
from r1ray.data.reasoning import Problem, draw_heldout
from r1ray.evaluation.accuracy import _judge, extract_answer, paired_difference, proportion


@pytest.fixture(scope="module")
def problem() -> Problem:
    tasks = TasksConfig(
        families=[FamilyConfig(name="chain_sum", options={"min_terms": 2, "max_terms": 2})],
        system_prompt="Think.",
    )
    return draw_heldout(tasks, 1)[0]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>1 + 1 = 2</think>\n2", "2"),
        ("<think>a</think>b</think> c ", "c"),
        ("no tags", "no tags"),
        ("<think>never closed", "<think>never closed"),
    ],
)
def test_the_answer_is_what_follows_the_last_closing_tag(reply: str, answer: str) -> None:
    assert extract_answer(reply) == answer


def test_only_a_reply_that_is_the_answer_counts_as_correct(problem: Problem) -> None:
    right = _judge(problem, f"<think>steps</think>\n{problem.answer}")
    prose = _judge(problem, f"<think>steps</think>\nThe answer is {problem.answer}.")
    wrong = _judge(problem, f"<think>{problem.answer}</think>\nnothing")
    longer = _judge(problem, f"<think></think>\n{problem.answer}7")
    assert (right.is_correct, right.mentions_answer) == (True, True)
    assert (prose.is_correct, prose.mentions_answer) == (False, True)
    assert (wrong.is_correct, wrong.mentions_answer) == (False, False)
    assert (longer.is_correct, longer.mentions_answer) == (False, False)


def test_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    some = proportion([True] * 81 + [False] * 182)
    assert (some.value, some.count) == (81 / 263, 263)
    assert (some.low, some.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    none = proportion([False] * 20)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_an_interval_holds_its_share() -> None:
    for count in range(1, 400):
        none, all_ = proportion([False] * count), proportion([True] * count)
        assert none.low == 0.0
        assert all_.high == 1.0


def test_paired_difference_is_certain_where_every_pair_agrees_and_not_elsewhere() -> None:
    first = [True, False] * 50
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)
    mean, low, high = paired_difference([True] * 60 + [False] * 40, [False] * 100)
    assert mean == pytest.approx(0.6)
    # Normal approximation: 0.6 +- 1.96 * sqrt(0.6 * 0.4 / 100) = 0.6 +- 0.096.
    assert (low, high) == pytest.approx((0.504, 0.696), abs=0.02)
    # Of thirds: 50 times 1/3 and 50 times 0; 1/6 +- 1.96 * (1/6) / sqrt(100) = 0.167 +- 0.033.
    mean, low, high = paired_difference([1 / 3, 2 / 3] * 50, [0, 2 / 3] * 50)
    assert (mean, low, high) == pytest.approx((1 / 6, 0.134, 0.199), abs=0.01)
