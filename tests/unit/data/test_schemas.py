import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.schemas import (
    COLUMNS,
    MAX_TURNS,
    Conversation,
    RowError,
    called_functions,
    normalize_row,
)

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
TURNS = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be brief."}


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    return normalize_row(row).messages


def _one(role: str, **turn: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What becomes of one turn before a last answer, or of the last answer."""
    last = [] if role == "assistant" else [ASSISTANT]
    found = normalize_row({"messages": [USER, {"role": role, **turn}, *last]})
    return found.messages[1], found.ignored


@pytest.mark.parametrize(
    "columns",
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("problem", "solution"),
        ("question", "answer"),
        ("question", "response"),
        ("instruction", "output"),
        ("query", "response"),
    ],
)
def test_a_pair_of_columns_becomes_two_turns(columns: tuple[str, str]) -> None:
    row = dict(zip(columns, ("Hi", "Hello"), strict=True))
    assert normalize_row({**row, "id": 3}) == Conversation(TURNS)
    assert _messages({**row, "system": "Be brief."}) == [SYSTEM, *TURNS]
    assert _messages({**row, "system": ""}) == _messages({**row, "system": None}) == TURNS
    assert set(columns) <= set(COLUMNS)


def test_prompt_and_completion_may_be_turns() -> None:
    assert _messages({"prompt": TURNS[:1], "completion": "Hello"}) == TURNS
    assert _messages({"prompt": "Hi", "completion": TURNS[1:]}) == TURNS
    assert _messages({"prompt": [SYSTEM, USER], "completion": TURNS[1:]}) == [SYSTEM, *TURNS]


def test_messages_are_taken_as_they_are() -> None:
    row = {"messages": [SYSTEM, *TURNS], "prompt": "x", "completion": "y", "system": "z", "id": 7}
    assert normalize_row(row) == Conversation([SYSTEM, *TURNS])


def test_sharegpt_conversations_are_translated() -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi", "weight": None},
        {"from": "gpt", "value": "Hello", "weight": 1},
        {"from": "observation", "value": "42"},
        {"from": "tool", "value": "43"},
        {"from": "user", "value": "So?"},
        {"from": "assistant", "value": "Bye"},
    ]
    found = normalize_row({"conversations": turns, "prompt": "x", "completion": "y"})
    assert [(turn["role"], turn["content"]) for turn in found.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("tool", "42"),
        ("tool", "43"),
        ("user", "So?"),
        ("assistant", "Bye"),
    ]
    assert found.ignored == ("turn.weight",)
    assert _messages({"conversations": TURNS, "system": "Be brief."}) == [SYSTEM, *TURNS]


def test_the_layouts_are_tried_in_order_and_nulls_do_not_count() -> None:
    row: dict[str, Any] = {
        "messages": None,
        "conversations": None,
        "prompt": "p",
        "completion": None,
        "problem": None,
        "generations": None,
        "solution": "s",
        "question": "q",
        "answer": "a",
        "response": "r",
    }
    assert [turn["content"] for turn in _messages(row)] == ["p", "r"]
    row["response"] = None
    assert [turn["content"] for turn in _messages(row)] == ["q", "a"]
    row["problem"] = "b"
    assert [turn["content"] for turn in _messages(row)] == ["b", "s"]


def test_an_alpaca_input_follows_the_instruction_after_a_blank_line() -> None:
    row = {"instruction": "Add.", "output": "3"}
    assert _messages({**row, "input": "1 and 2"})[0]["content"] == "Add.\n\n1 and 2"
    for empty in (None, "", " "):
        assert _messages({**row, "input": empty})[0]["content"] == "Add."


def _openr1(**columns: Any) -> str:
    row = {"problem": "p", "generations": ["a", "b", "c"], "solution": "s", "answer": "x"}
    return str(_messages({**row, **columns})[1]["content"])


def test_the_first_complete_and_correct_generation_is_taken() -> None:
    assert _openr1() == "a"
    assert _openr1(is_reasoning_complete=[False, True, True]) == "b"
    assert _openr1(correctness_math_verify=[False, False, True]) == "c"
    both = {"correctness_math_verify": [False] * 3, "correctness_llama": [False, True, True]}
    assert _openr1(**both) == "b"
    assert _openr1(**both, is_reasoning_complete=[True, False, True]) == "c"
    assert _openr1(correctness_math_verify=[True] * 3, correctness_llama=None) == "a"
    assert _openr1(correctness_math_verify=[None, True]) == "b"
    assert _openr1(generations=None) == "s"


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"correctness_math_verify": [False] * 3}, "no generation is complete and correct"),
        ({"is_reasoning_complete": []}, "no generation is complete and correct"),
        ({"generations": []}, "no generation is complete and correct"),
        ({"generations": "a"}, "`generations` is str, not a list"),
        ({"correctness_llama": True}, "`correctness_llama` is bool, not a list"),
        ({"generations": [None]}, "turn 1 has content of type NoneType"),
    ],
)
def test_a_problem_without_a_usable_generation_is_a_row_error(
    columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RowError, match=reason):
        _openr1(**columns)


def test_the_developer_speaks_as_the_system() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert _messages({"messages": [developer, *TURNS]}) == [SYSTEM, *TURNS]


@pytest.mark.parametrize("role", ["reasoning", "thinking"])
def test_a_reasoning_turn_joins_the_answer_that_follows(role: str) -> None:
    turn = {"role": role, "content": "Hm."}
    expected = {**ASSISTANT, "reasoning_content": "Hm."}
    assert _messages({"messages": [USER, turn, ASSISTANT]}) == [USER, expected]
    assert _messages({"messages": [USER, turn, {**ASSISTANT, "thinking": "Hm."}]})[1] == expected
    for later in ([], [USER, ASSISTANT], [turn, ASSISTANT]):
        with pytest.raises(RowError, match="turn 1 is reasoning and no assistant turn follows it"):
            normalize_row({"messages": [USER, turn, *later]})
    for own in ({"reasoning": "Oh."}, {"content": "<think>\nOh.\n</think>\nHello"}):
        with pytest.raises(RowError, match="turn 2 has reasoning of its own and in the turn"):
            normalize_row({"messages": [USER, turn, {**ASSISTANT, **own}]})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_an_answer_is_kept_under_one_name(name: str) -> None:
    expected = {**ASSISTANT, "reasoning_content": "Hm."}
    assert _one("assistant", content="Hello", **{name: "Hm."}) == (expected, ())
    assert _one("assistant", content="Hello", **{name: ""}) == (ASSISTANT, ())
    assert _one("user", content="Hi", **{name: "Hm."}) == (USER, (f"turn.{name}",))
    # Content that holds the reasoning already is left as it is.
    twice = {"content": "<think>\nHm.\n</think>\nHello", name: "Hm."}
    assert _one("assistant", **twice) == (
        {"role": "assistant", "content": twice["content"]},
        (f"turn.{name}",),
    )
    with pytest.raises(RowError, match=f"turn 1 has {name} of type dict, not a string"):
        _one("assistant", content="Hello", **{name: {"text": "Hm."}})


def test_one_of_several_reasonings_is_kept_and_the_others_are_named() -> None:
    turn, ignored = _one(
        "assistant", content="x", thinking="c", reasoning="b", reasoning_content=""
    )
    assert turn["reasoning_content"] == "b"
    assert ignored == ("turn.thinking",)


@pytest.mark.parametrize("content", [None, "", " ", []])
def test_an_answer_that_calls_tools_may_have_no_content(content: Any) -> None:
    calls = [{"id": "7", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turn, ignored = _one("assistant", content=content, tool_calls=calls)
    assert turn == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "7", "type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert ignored == ()
    assert called_functions(turn) == ["f"]
    with pytest.raises(RowError, match="turn 1"):
        _one("assistant", content=content, tool_calls=[])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ('{"a": null}', {"a": None}),
        ({"a": 1, "b": None}, {"a": 1}),
        ("[1]", "[1]"),
        ("no JSON", "no JSON"),
        ("", ""),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_arguments_become_an_object_where_they_are_json_of_one(arguments: Any, kept: Any) -> None:
    turn, _ = _one("assistant", tool_calls=[{"name": "f", "arguments": arguments}])
    assert turn["tool_calls"] == [{"name": "f", "arguments": kept}]
    assert called_functions(turn) == ["f"]


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ("f(1)", "tool_calls of type str, no list"),
        (["f"], "a tool call of type str, no object"),
        ([{"function": "f"}], "a tool call without a function name"),
        ([{"function": {"name": " "}}], "a tool call without a function name"),
        ([{"arguments": {}}], "a tool call without a function name"),
        ([{"name": "f", "arguments": b"x"}], "tool_calls holds a bytes, which is not JSON"),
        ([{"name": "f", "arguments": _nested(100)}], "nested deeper than 64 levels"),
        (
            [{"name": "f", "arguments": json.dumps({"a": _nested(100)})}],
            "nested deeper than 64 levels",
        ),
    ],
)
def test_tool_calls_of_another_form_are_row_errors(calls: Any, reason: str) -> None:
    with pytest.raises(RowError, match=f"turn 1.*{reason}"):
        _one("assistant", tool_calls=calls)


def test_a_tool_turn_keeps_its_call_and_every_turn_its_name() -> None:
    fields = {"content": "42", "tool_call_id": "7", "name": "f"}
    assert _one("tool", **fields) == ({"role": "tool", **fields}, ())
    user, ignored = _one("user", **fields)
    assert user == {"role": "user", "content": "42", "name": "f"}
    assert ignored == ("turn.tool_call_id",)
    with pytest.raises(RowError, match="turn 1 has name of type int, not a string"):
        _one("user", content="x", name=3)


def test_fields_that_are_not_used_are_named_unless_they_are_empty() -> None:
    more = {"weight": 0, "id": "x", "train": False, "note": None, "extra": "", "images": []}
    assert _one("user", content="Hi", **more) == (USER, ("turn.id", "turn.train", "turn.weight"))


def test_text_parts_are_joined_and_others_refused() -> None:
    parts = [
        {"type": "text", "text": "H", "image_url": None},
        {"type": "text", "text": "i", "cache": {"type": "brief"}},
    ]
    assert _one("user", content=parts) == (USER, ("turn.content.cache",))
    for part, reason in [
        ({"type": "image_url", "image_url": "x"}, "a part of type 'image_url', not 'text'"),
        ({"text": "x"}, "a part of type None, not 'text'"),
        ("x", "a part of type 'str', not 'text'"),
        ({"type": "text", "text": None}, "a text part without a text"),
    ]:
        with pytest.raises(RowError, match=reason):
            _one("user", content=[part])


def test_tools_are_kept_as_a_list_or_as_json_of_one() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": {}, "b": None}}}]
    kept = [{"type": "function", "function": {"name": "f", "parameters": {"a": {}}}}]
    assert normalize_row({"messages": TURNS, "tools": tools}).tools == kept
    assert normalize_row({"messages": TURNS, "tools": json.dumps(tools)}).tools == tools
    for empty in (None, "", " ", [], "[]"):
        assert normalize_row({"messages": TURNS, "tools": empty}).tools is None
    for bad in ("f(x)", "{}", ["f"], 3, {"name": "f"}):
        with pytest.raises(RowError, match="`tools` is no list of function definitions"):
            normalize_row({"messages": TURNS, "tools": bad})


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "row is list, not an object"),
    "null": (None, "row is NoneType, not an object"),
    "no fields": ({"text": "x"}, "neither `messages` nor `prompt` and `completion`"),
    "no completion": ({"prompt": "x"}, "neither `messages`"),
    "null completion": ({"prompt": "x", "completion": None}, "neither `messages`"),
    "no turns": ({"messages": []}, "`messages` is not a non-empty list"),
    "messages is text": ({"messages": "hi"}, "`messages` is not a non-empty list"),
    "conversations is text": ({"conversations": "x"}, "`conversations` is not a non-empty list"),
    "turn is text": ({"messages": ["hi"]}, "turn 0 is str, not an object"),
    "ShareGPT turn is text": ({"conversations": ["hi"]}, "turn 0 is str, not an object"),
    "wrong role": ({"messages": [{"role": "bot", "content": "x"}]}, "turn 0 has role 'bot'"),
    "wrong ShareGPT role": ({"conversations": [{"from": "bing", "value": "x"}]}, "role 'bing'"),
    "ShareGPT role in messages": ({"messages": [{"role": "gpt", "content": "x"}]}, "role 'gpt'"),
    "role is a list": ({"messages": [{"role": [], "content": "x"}]}, "turn 0 has role []"),
    "no role": ({"messages": [{"content": "x"}]}, "turn 0 has role None"),
    "empty turn": ({"messages": [{"role": "user", "content": " \n"}, ASSISTANT]}, "0 is empty"),
    "empty prompt": ({"prompt": "", "completion": "x"}, "turn 0 is empty"),
    "empty list of turns": ({"prompt": [], "completion": []}, "there is no turn"),
    "no turn but the system's": ({"prompt": [], "completion": [], "system": "x"}, "is 'system'"),
    "content is a number": ({"prompt": 3, "completion": "x"}, "content of type int, not a string"),
    "content is missing": ({"messages": [{"role": "user"}]}, "content of type NoneType"),
    "ends in a user turn": ({"messages": TURNS[:1]}, "last turn is 'user', not 'assistant'"),
    "ends in a tool turn": ({"conversations": [{"from": "observation", "value": "x"}]}, "'tool'"),
    "system is a number": ({"prompt": "x", "completion": "y", "system": 1}, "`system` is int"),
    "input is a list": ({"instruction": "x", "output": "y", "input": [1]}, "`input` is list"),
    "instruction is a number": ({"instruction": 1, "output": "y", "input": "x"}, "type int"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_a_row_error_with_its_reason(name: str) -> None:
    value, reason = BAD_ROWS[name]
    with pytest.raises(RowError) as caught:
        normalize_row(value)
    assert reason in str(caught.value)


_NAMES = [*COLUMNS, "role", "content", "from", "value", "type", "text", "tool_calls", "name",
          "function", "arguments", "reasoning", "tool_call_id"]  # fmt: skip
_TEXTS = st.text(max_size=5) | st.sampled_from(
    ["user", "assistant", "tool", "reasoning", "human", "gpt", "text", '{"a": 1}', "[{}]"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | _TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
_TURN_LISTS = st.lists(
    st.fixed_dictionaries(
        {"role": _TEXTS, "content": _VALUES},
        optional=dict.fromkeys(("tool_calls", "reasoning", "name", "weight"), _VALUES),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(
    value=_VALUES | st.fixed_dictionaries({"messages": _TURN_LISTS}, optional={"tools": _VALUES})
)
def test_any_json_value_is_a_conversation_or_a_row_error(value: Any) -> None:
    try:
        found = normalize_row(value)
    except RowError:
        return
    assert found.messages[-1]["role"] == "assistant"
    for turn in found.messages:
        assert turn["content"].strip() or turn["tool_calls"]
        assert called_functions(turn) or "tool_calls" not in turn
        assert turn["role"] in ("system", "user", "assistant", "tool")
    assert list(found.ignored) == sorted(set(found.ignored))
    json.dumps([found.messages, found.tools])


def test_a_system_column_goes_in_front_of_messages_that_have_no_system_turn() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    found = normalize_row({"messages": turns, "system": "Be brief."}).messages
    assert found == [{"role": "system", "content": "Be brief."}, *turns]
    own = [{"role": "developer", "content": "Mine."}, *turns]
    found = normalize_row({"messages": own, "system": "Be brief."}).messages
    assert [turn["content"] for turn in found] == ["Mine.", "hi", "hello"]


def test_a_conversation_without_end_is_refused() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert len(normalize_row({"messages": turns * (MAX_TURNS // 2)}).messages) == MAX_TURNS
    with pytest.raises(RowError, match="514 turns, the most is 512"):
        normalize_row({"messages": turns * (MAX_TURNS // 2 + 1)})
