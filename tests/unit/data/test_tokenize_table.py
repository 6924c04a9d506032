import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from r1ray.data.sources import rows_to_table
from r1ray.data.tokenize import Overflow
from r1ray.data.tokenize_table import RESULT_SCHEMA, tokenize_table
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def _row(number: int, question: str, answer: str, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"source": "a.jsonl", "row": number, "messages": json.dumps(messages), **columns}


def _tokenize(
    model_dir: Path,
    rows: Sequence[dict[str, Any]],
    *,
    max_tokens: int = 60,
    overflow: Overflow = "reject",
    heldout: Sequence[str] = (),
) -> list[dict[str, Any]]:
    result = tokenize_table(
        rows_to_table(rows),
        tokenizer_dir=str(model_dir),
        max_tokens=max_tokens,
        overflow=overflow,
        heldout_questions=frozenset(heldout),
    )
    assert result.schema == RESULT_SCHEMA
    return result.to_pylist()


LONG = "0123456789 " * 12


def test_every_row_comes_out_in_order_as_a_sample_or_as_an_error(model_dir: Path) -> None:
    bad = {"source": "b.jsonl", "row": 5, "error": "not JSON (here)", "excerpt": "{"}
    rows = [_row(3, "hi", "one"), bad, _row(6, "hi", LONG), _row(7, "hi", "two")]
    first, second, third, fourth = _tokenize(model_dir, rows)
    tokenizer = Tokenizer(model_dir)
    for found, answer in ((first, "one"), (fourth, "two")):
        targets = [
            token
            for token, flag in zip(found["input_ids"], found["is_target"], strict=True)
            if flag
        ]
        assert tokenizer.decode(targets) == answer
        assert (found["piece"], found["was_over_long"], found["num_dropped_pieces"]) == (
            0,
            False,
            0,
        )
        assert found["error"] is found["source"] is None
    assert {name: second[name] for name in bad} == bad
    assert (third["source"], third["row"]) == ("a.jsonl", 6)
    assert third["error"].endswith("tokens, max_tokens is 60")
    assert third["excerpt"] == rows[2]["messages"][:200]
    for found in (second, third):
        assert found["input_ids"] is found["is_target"] is None
        assert found["piece"] == 0


def test_a_split_row_gives_pieces_that_are_counted_as_one_row(model_dir: Path) -> None:
    rows = [_row(0, "hi", "short"), _row(1, "hi", LONG, ignored=["turn.weight"])]
    [short, *pieces] = _tokenize(model_dir, rows, overflow="split")
    [whole] = _tokenize(model_dir, rows[1:], max_tokens=512)
    assert not short["was_over_long"]
    assert len(pieces) >= 3
    assert [piece["piece"] for piece in pieces] == list(range(len(pieces)))
    assert [piece["was_over_long"] for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece["ignored"] for piece in pieces] == [["turn.weight"]] + [None] * (len(pieces) - 1)
    joined = pieces[0]["input_ids"] + [
        token for piece in pieces[1:] for token in piece["input_ids"][1:]
    ]
    assert joined == whole["input_ids"]
    assert all(len(piece["input_ids"]) <= 60 for piece in pieces)
    num_targets = sum(sum(piece["is_target"]) for piece in pieces)
    assert num_targets == sum(whole["is_target"])


def test_pieces_without_a_target_are_dropped_and_counted_with_the_row(model_dir: Path) -> None:
    pieces = _tokenize(model_dir, [_row(0, LONG * 2, "end")], overflow="split")
    assert len(pieces) == 1
    assert pieces[0]["num_dropped_pieces"] >= 2
    assert pieces[0]["was_over_long"]
    assert pieces[0]["piece"] == 0


@pytest.mark.parametrize("overflow", ["reject", "truncate", "split"])
def test_an_over_long_row_is_marked_once_whatever_is_done_with_it(
    overflow: Overflow, model_dir: Path
) -> None:
    rows = [_row(0, "hi", "short"), _row(1, "hi", LONG), _row(2, "hi", "short")]
    found = _tokenize(model_dir, rows, overflow=overflow)
    assert sum(row["was_over_long"] for row in found) == 1
    assert sum(row["error"] is not None for row in found) == (overflow == "reject")
    num_samples = sum(row["input_ids"] is not None for row in found)
    assert num_samples == {"reject": 2, "truncate": 3}.get(overflow, num_samples)
    assert overflow != "split" or num_samples > 4


def test_a_row_that_is_cut_before_its_answer_is_over_long_as_well(model_dir: Path) -> None:
    [found] = _tokenize(model_dir, [_row(0, LONG, "end")], overflow="truncate")
    assert found["error"] == "no answer token is left within max_tokens"
    assert found["was_over_long"]


@pytest.mark.parametrize("question", ["what is 1+1?", "  what is 1+1?\n"])
def test_held_out_questions_are_refused_in_any_turn(question: str, model_dir: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", question), ("assistant", "two")]
    messages = json.dumps([{"role": role, "content": content} for role, content in turns])
    rows = [
        _row(0, question, "two"),
        {"source": "a.jsonl", "row": 1, "messages": messages},
        _row(2, "what is 1+2?", question),  # in an answer it may be repeated
    ]
    found = _tokenize(model_dir, rows, max_tokens=200, heldout=["what is 1+1?"])
    reason = "the question is held out for evaluation"
    assert [row["error"] for row in found] == [reason, reason, None]
    assert [row["row"] for row in found[:2]] == [0, 1]


def test_tools_reach_the_chat_template(tmp_path: Path) -> None:
    model_dir = write_tiny_model(tmp_path)
    template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}"
    path = model_dir / "chat_template.jinja"
    path.write_text(template + path.read_text())
    tools = json.dumps([{"name": "adder"}])
    with_tools, without = _tokenize(
        model_dir, [_row(0, "hi", "one", tools=tools), _row(1, "hi", "one")]
    )
    tokenizer = Tokenizer(model_dir)
    assert tokenizer.decode(with_tools["input_ids"]).startswith("adder")
    assert "adder" not in tokenizer.decode(without["input_ids"])


def test_no_rows_and_rows_that_are_all_bad_make_tables_too(model_dir: Path) -> None:
    assert _tokenize(model_dir, []) == []
    bad = {"source": "b.jsonl", "row": 0, "error": "not JSON", "excerpt": "{"}
    [found] = _tokenize(model_dir, [bad])
    assert found["error"] == "not JSON"


def test_results_of_different_tasks_can_be_joined(model_dir: Path) -> None:
    options: dict[str, Any] = {
        "tokenizer_dir": str(model_dir),
        "max_tokens": 60,
        "overflow": "reject",
        "heldout_questions": frozenset(),
    }
    bad = {"source": "b.jsonl", "row": 0, "error": "not JSON", "excerpt": "{"}
    tables = [
        tokenize_table(rows_to_table(rows), **options)
        for rows in ([bad], [_row(0, "hi", "one")], [])
    ]
    assert pa.concat_tables(tables).num_rows == 2
