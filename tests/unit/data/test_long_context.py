"""Long-context tasks: they fit, hold their answers, and are scored by them."""

import re
from pathlib import Path

import pytest

from r1ray.data.long_context import (
    TASKS,
    LongTask,
    build_long_task,
    build_passkey,
    score_reply,
    write_conversation,
)
from r1ray.errors import ConfigError
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model


def _count(text: str) -> int:
    return len(text) // 4


def _build(name: str, max_tokens: int = 2000, seed: int = 0) -> LongTask:
    return build_long_task(name, _count, max_tokens, seed=seed)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("max_tokens", [1500, 4000, 60_000])
def test_tasks_fill_their_tokens_and_hold_their_answers(name: str, max_tokens: int) -> None:
    task = _build(name, max_tokens)
    assert 0.85 * max_tokens < _count(task.prompt) <= max_tokens
    assert len(set(task.answers)) == len(task.answers)
    assert all(answer in task.prompt for answer in task.answers)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_and_another_one_differs(name: str) -> None:
    assert _build(name) == _build(name)
    assert _build(name) != _build(name, seed=1)


def test_the_needle_that_is_asked_for_is_the_one_in_the_answer() -> None:
    for name, kind in (("niah_single_1", "number"), ("niah_multikey_2", "number")):
        task = _build(name)
        (key,) = re.findall(rf"What is the special magic {kind} for (\S+) mentioned", task.prompt)
        (value,) = re.findall(rf"special magic {kind}s for {key} is: (\d+)\.", task.prompt)
        assert task.answers == (value,)


def test_a_chain_of_variables_ends_at_the_value_that_is_asked_for() -> None:
    task = _build("vt")
    assignments = dict(re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", task.prompt, re.MULTILINE))
    (value,) = re.findall(r"Find all variables that are assigned the value (\d+)", task.prompt)

    def follow(name: str) -> str:
        return follow(assignments[name]) if name in assignments else name

    assert len(assignments) == 10
    assert {name for name in assignments if follow(name) == value} == set(task.answers)
    lines = task.prompt.splitlines()
    places = [lines.index(line) for line in lines if line.startswith(f"VAR {task.answers[0]}")]
    for name in task.answers[1:]:  # a variable is there before another one takes its value
        (place,) = [at for at, line in enumerate(lines) if line.startswith(f"VAR {name} =")]
        assert place > places[-1]
        places.append(place)


@pytest.mark.parametrize(("name", "count"), [("cwe", 10), ("fwe", 3)])
def test_the_words_asked_for_are_the_most_frequent(name: str, count: int) -> None:
    task = _build(name)
    body = task.prompt.split("\n")[1]
    words = [word for word in body.split() if word.isalpha()]
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert set(ranked[:count]) == set(task.answers)
    assert words.count(ranked[count - 1]) > words.count(ranked[count])


def test_replies_are_scored_by_the_answers_in_them() -> None:
    assert score_reply("It is ABC and 12.", ("abc", "12")) == 1.0
    assert score_reply("It is ABC.", ("abc", "12")) == 0.5
    assert score_reply("", ("abc",)) == 0.0


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="cwe does not fit 100 tokens at its shortest"):
        _build("cwe", 100)
    with pytest.raises(ConfigError, match="no task 'x'; there are niah_single_1"):
        _build("x")


@pytest.mark.parametrize(("name", "questions"), [("niah_multikey_3", 16), ("vt", 2), ("cwe", 1)])
def test_a_conversation_asks_more_about_the_same_text(name: str, questions: int) -> None:
    task = _build(name, 6000)
    turns = task.to_conversation()
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * questions
    assert turns[0]["content"] == task.prompt
    for turn in turns[1::2]:
        assert all(answer in task.prompt for answer in turn["content"].rstrip(".").split(", "))
    assert len({turn["content"] for turn in turns[::2]}) == questions


def test_a_text_with_several_questions_is_a_task_for_each() -> None:
    task = _build("niah_multikey_2", 6000)
    tasks = task.split()
    assert len(tasks) == 16
    assert (tasks[0].prompt, tasks[0].answers) == (task.prompt, task.answers)
    for each in tasks:
        assert each.text == task.text
        assert not each.further
        (key,) = re.findall(r"What is the special magic number for (\S+) mentioned", each.question)
        assert f"numbers for {key} is: {each.answers[0]}." in each.text


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("tasks", [tuple(TASKS), ("vt",), ()])
def test_training_samples_fit(number: int, tasks: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tiny_model(tmp_path))
    turns = write_conversation(tokenizer, number, max_tokens=3000, tasks=tasks)
    again = write_conversation(tokenizer, number, max_tokens=3000, tasks=tasks)
    assert turns == again
    longest = turns[0 if tasks else 1]["content"]
    assert 300 < len(tokenizer.encode(longest)) < 3000
    assert turns[-1]["role"] == "assistant"


@pytest.mark.parametrize("max_tokens", [60, 2_000_000])
def test_windows_that_there_cannot_be_are_said(max_tokens: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tiny_model(tmp_path))
    with pytest.raises(ConfigError, match=f"no window of {max_tokens} tokens"):
        write_conversation(tokenizer, 0, max_tokens=max_tokens, tasks=())


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_passkey_lies_at_its_depth(depth: float) -> None:
    task = build_passkey(depth, _count, 2000, seed=3)
    assert 0.95 * 2000 < _count(task.prompt) <= 2000
    (key,) = task.answers
    lines = task.prompt.splitlines()[1:-1]
    (place,) = [at for at, line in enumerate(lines) if key in line]
    assert place / (len(lines) - 1) == pytest.approx(depth, abs=0.02)
    assert build_passkey(depth, _count, 2000, seed=4).answers != task.answers


def test_a_passkey_that_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="passkey does not fit 20 tokens at its shortest"):
        build_passkey(0.5, _count, 20, seed=0)
