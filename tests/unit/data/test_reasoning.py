import re
from typing import Any

import pytest

from r1ray.config.prepare import FamilyConfig, TasksConfig
from r1ray.data.reasoning import (
    Problem,
    build_messages,
    draw_heldout,
    draw_training,
    supported_families,
)
from r1ray.errors import ConfigError


def _tasks(*families: tuple[str, dict[str, Any]]) -> TasksConfig:
    return TasksConfig(
        families=[FamilyConfig(name=name, options=options) for name, options in families],
        system_prompt="Think.",
    )


ALL = _tasks(*((family, {}) for family in supported_families()))
# Few distinct problems: held-out and training questions would collide if nobody looked.
NARROW = _tasks(
    ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ("spell_backward", {"min_word_len": 3, "max_word_len": 3}),
)


@pytest.mark.parametrize("family", supported_families())
def test_every_trace_is_correct_and_well_formed(family: str) -> None:
    problems = draw_heldout(_tasks((family, {})), 50)
    assert len({problem.question for problem in problems}) == 50
    for problem in problems:
        trace = problem.trace()
        match = re.fullmatch(r"<think>\n(.+)\n</think>\n(.+)", trace, flags=re.DOTALL)
        assert match is not None, trace
        assert problem.score(match[2]) == 1.0
        assert problem.score("certainly wrong") < 1.0
        assert problem.score(None) < 1.0


def test_a_wrong_trace_is_an_error_and_never_training_data() -> None:
    [problem] = draw_heldout(_tasks(("chain_sum", {})), 1)
    metadata = {**problem.entry["metadata"], "expression": "1 + 1"}
    entry = {**problem.entry, "metadata": metadata}
    wrong = Problem(problem.family, problem.question, problem.answer, entry, problem.scorer)
    with pytest.raises(ConfigError, match="trace writer of chain_sum does not cover"):
        wrong.trace()


def test_sums_of_negative_terms_are_traced() -> None:
    options = {"min_terms": 2, "max_terms": 3, "allow_negation": True}
    problems = draw_heldout(_tasks(("chain_sum", options)), 40)
    assert any("- -" in problem.question for problem in problems)
    assert all(problem.trace().endswith(problem.answer) for problem in problems)


@pytest.mark.parametrize("tasks", [ALL, NARROW], ids=["all", "narrow"])
def test_training_and_heldout_questions_are_distinct_and_disjoint(tasks: TasksConfig) -> None:
    heldout = draw_heldout(tasks, 40)
    training = draw_training(tasks, 120, heldout)
    asked = [problem.question for problem in training]
    assert len(set(asked)) == 120
    assert len({problem.question for problem in heldout}) == 40
    assert not set(asked) & {problem.question for problem in heldout}


def test_families_are_drawn_in_equal_parts_and_the_same_every_time() -> None:
    first, second = draw_training(ALL, 21, []), draw_training(ALL, 21, [])
    assert [problem.question for problem in first] == [problem.question for problem in second]
    names = [problem.family for problem in first]
    assert {names.count(family) for family in supported_families()} == {3}


@pytest.mark.parametrize(
    ("family", "options", "complaint"),
    [
        ("no_such_family", {}, "no trace writer for 'no_such_family'; choose from chain_sum"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "refuses options"),
        ("chain_sum", {"no_such_option": 1}, "refuses options"),
        ("chain_sum", {"min_terms": "many"}, "refuses options"),
        ("gcd", {"min_numbers": -1}, "refuses options"),
        ("spell_backward", {"min_word_len": 500, "max_word_len": 600}, "refuses options"),
    ],
)
def test_impossible_options_are_config_errors(
    family: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        draw_heldout(_tasks((family, options)), 3)


def test_a_family_with_too_few_problems_says_so() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(ConfigError, match="chain_sum has too few distinct problems for 5000"):
        draw_training(_tasks(("chain_sum", options)), 5000, [])


def test_a_problem_is_posed_by_a_system_and_a_user_turn() -> None:
    [problem] = draw_heldout(_tasks(("gcd", {})), 1)
    system, user = build_messages(problem, "Think.")
    assert system == {"role": "system", "content": "Think."}
    assert user == {"role": "user", "content": problem.question.strip()}
