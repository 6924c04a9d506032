"""From one row of a data set to a conversation, in whichever known layout the row is.

1. The first layout whose columns are not null is taken: `messages`; ShareGPT's `conversations`;
   else the first pair of `_PAIRS`, a question column and an answer column.
2. Every turn is checked and reduced to what a chat template may use: role, content, and where they
   are given name, tool_call_id, reasoning_content and tool_calls. Names of other fields that hold
   something are kept in `ignored`.
3. Reasoning in a turn of its own is merged into the assistant turn that follows.

A null counts as absent: Parquet gives a struct one for each field that only other rows have.
Price: one pass over the turns, about 3 microseconds a turn.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COLUMNS", "MAX_TURNS", "Conversation", "RowError", "called_functions", "normalize_row"]

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("problem", "generations"),
    ("problem", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("query", "response"),
)
_COMPLETE = "is_reasoning_complete"
_CORRECT = ("correctness_math_verify", "correctness_llama")
_OTHERS = ("messages", "conversations", "system", "tools", "input", _COMPLETE, *_CORRECT)
COLUMNS = tuple(dict.fromkeys([*_OTHERS, *(column for pair in _PAIRS for column in pair)]))
"""Every column that `normalize_row` may use."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "reasoning": "reasoning",
    "thinking": "reasoning",
}
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
MAX_TURNS = 512  # each answer is rendered with all turns before it
_MAX_DEPTH = 64  # of tools and tool calls; keeps every later recursion within Python's limit
_MAX_NAME_CHARS = 40


class RowError(ValueError):
    """A row cannot be used; the message is its reason in the quarantine file."""


@dataclass(frozen=True)
class Conversation:
    """Turns that end in an assistant turn, the functions on offer, and the fields left out."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    ignored: tuple[str, ...] = ()
    """Sorted names of turn fields that held something and were not used, like `turn.weight`."""
    num_images: int = 0
    """Images that the first user turn begins with."""


def normalize_row(value: Any) -> Conversation:
    """The conversation of one row.

    Raises:
        RowError: it has none, or one that does not end in an assistant turn.
    """
    if not isinstance(value, dict):
        raise RowError(f"row is {type(value).__name__}, not an object")
    ignored: set[str] = set()
    messages = _clean_turns(_find_turns(value), ignored)
    if not messages:
        raise RowError("there is no turn")
    if messages[-1]["role"] != "assistant":
        raise RowError(f"last turn is {messages[-1]['role']!r}, not 'assistant'")
    return Conversation(messages, _check_tools(value.get("tools")), tuple(sorted(ignored)))


def called_functions(message: dict[str, Any]) -> list[str]:
    """Names of the functions that a clean turn calls."""
    return [call.get("function", call)["name"] for call in message.get("tool_calls", ())]


def _find_turns(row: dict[str, Any]) -> list[Any]:
    """The turns as {role, content, ...}, not checked yet."""
    for layout in ("messages", "conversations"):
        turns = row.get(layout)
        if turns is None:
            continue
        if not isinstance(turns, list) or not turns:
            raise RowError(f"`{layout}` is not a non-empty list")
        if len(turns) > MAX_TURNS:
            raise RowError(f"{len(turns)} turns, the most is {MAX_TURNS}")
        return _add_system(row, turns if layout == "messages" else map(_from_sharegpt, turns))
    for question, answer in _PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            return _add_system(row, _pair_turns(row, question, answer))
    others = ", ".join("+".join(pair) for pair in _PAIRS[1:])
    raise RowError(
        f"neither `messages` nor `prompt` and `completion` (nor conversations, {others})"
    )


def _from_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = dict(turn)
    for theirs, ours in (("from", "role"), ("value", "content")):
        if turn.get(theirs) is not None:
            turn[ours] = turn.pop(theirs)
    if isinstance(turn.get("role"), str):
        turn["role"] = _SHAREGPT_ROLES.get(turn["role"], turn["role"])
    return turn


def _pair_turns(row: dict[str, Any], question: str, answer: str) -> list[Any]:
    asked, told = row[question], row[answer]
    if answer == "generations":
        told = _pick_generation(row)
    if question == "instruction" and (extra := _optional_text(row, "input")):
        asked = f"{asked}\n\n{extra}" if isinstance(asked, str) else asked
    turns: list[Any] = []
    for column, role, text in ((question, "user", asked), (answer, "assistant", told)):
        if column in ("prompt", "completion") and isinstance(text, list):
            turns += text  # turns already
        else:
            turns.append({"role": role, "content": text})
    return turns


def _pick_generation(row: dict[str, Any]) -> Any:
    """The first generation that is complete and correct, as far as the row says so."""
    flags = {name: row[name] for name in (_COMPLETE, *_CORRECT) if row.get(name) is not None}
    for name, values in {"generations": row["generations"], **flags}.items():
        if not isinstance(values, list):
            raise RowError(f"`{name}` is {type(values).__name__}, not a list")
    complete = flags.pop(_COMPLETE, None)
    for index, generation in enumerate(row["generations"]):
        here = slice(index, index + 1)  # a list may be too short
        is_complete = complete is None or complete[here] == [True]
        if is_complete and (not flags or any(flag[here] == [True] for flag in flags.values())):
            return generation
    raise RowError("no generation is complete and correct")


def _add_system(row: dict[str, Any], turns: Any) -> list[Any]:
    """The `system` column's text in front, where the turns have none of their own."""
    system, turns = _optional_text(row, "system"), list(turns)
    if not system or (turns and isinstance(turns[0], dict) and _is_system(turns[0])):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _is_system(turn: dict[str, Any]) -> bool:
    role = turn.get("role")
    return isinstance(role, str) and _ROLES.get(role) == "system"


def _optional_text(row: dict[str, Any], column: str) -> str:
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise RowError(f"`{column}` is {type(text).__name__}, not a string")
    return text if text and text.strip() else ""


def _clean_turns(turns: Sequence[Any], ignored: set[str]) -> list[dict[str, Any]]:
    clean: list[dict[str, Any]] = []
    reasoning: str | None = None
    for index, turn in enumerate(turns):
        message = _clean_turn(index, turn, ignored)
        if reasoning is not None:
            if message["role"] != "assistant":
                raise RowError(f"turn {index - 1} is reasoning and no assistant turn follows it")
            own = message.get("reasoning_content")
            if own not in (None, reasoning) or _has_thought(message["content"]):
                raise RowError(f"turn {index} has reasoning of its own and in the turn before")
            message["reasoning_content"] = reasoning
        reasoning = message["content"] if message["role"] == "reasoning" else None
        if reasoning is None:
            clean.append(message)
    if reasoning is not None:
        raise RowError(f"turn {len(turns) - 1} is reasoning and no assistant turn follows it")
    return clean


def _clean_turn(index: int, turn: Any, ignored: set[str]) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {index} is {type(turn).__name__}, not an object")
    given = turn.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError(f"turn {index} has role {given!r:.80}, not one of {', '.join(_ROLES)}")
    more: dict[str, Any] = {}
    if len(turn) > 2 or "content" not in turn:
        more = _more_fields(index, role, turn)
        if role == "assistant" and _has_thought(turn.get("content")):
            for name in _REASONING_FIELDS:  # would be there twice
                more.pop(name, None)
        ignored.update(
            f"turn.{_shown(name)}"
            for name, value in turn.items()
            if name not in ("role", "content", *more) and not _is_absent(value)
        )
        for name in _REASONING_FIELDS[1:]:  # the template's name for it
            if name in more:
                more["reasoning_content"] = more.pop(name)
    content = turn.get("content")
    if isinstance(content, list):
        content = _join_parts(index, content, ignored)
    if content is None and "tool_calls" in more:
        content = ""
    if not isinstance(content, str):
        raise RowError(f"turn {index} has content of type {type(content).__name__}, not a string")
    if not content.strip():
        if "tool_calls" not in more:
            raise RowError(f"turn {index} is empty")
        content = ""
    return {"role": role, "content": content, **more}


def _more_fields(index: int, role: str, turn: dict[str, Any]) -> dict[str, Any]:
    """What a turn holds beside role and content, as far as its role uses it."""
    names = ["name"] if role != "reasoning" else []
    if role == "tool":
        names.append("tool_call_id")
    if role == "assistant":
        names += [name for name in _REASONING_FIELDS if not _is_absent(turn.get(name))][:1]
    more: dict[str, Any] = {}
    for name in names:
        value = turn.get(name)
        if _is_absent(value):
            continue
        if not isinstance(value, str):
            raise RowError(f"turn {index} has {name} of type {type(value).__name__}, not a string")
        more[name] = value
    if role == "assistant" and not _is_absent(calls := turn.get("tool_calls")):
        if not isinstance(calls, list):
            raise RowError(f"turn {index} has tool_calls of type {type(calls).__name__}, no list")
        more["tool_calls"] = [_check_call(index, call) for call in calls]
    return more


def _has_thought(content: Any) -> bool:
    return isinstance(content, str) and content.lstrip().startswith("<think>")


def _is_absent(value: Any) -> bool:
    """Null, or an empty string, list or object; false and 0 say something."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _shown(name: Any) -> str:
    return str(name)[:_MAX_NAME_CHARS].encode("utf-8", "replace").decode()


def _join_parts(index: int, parts: list[Any], ignored: set[str]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text":
            raise RowError(f"turn {index} has a part of type {kind!r:.80}, not 'text'")
        if not isinstance(part.get("text"), str):
            raise RowError(f"turn {index} has a text part without a text")
        texts.append(part["text"])
        ignored.update(
            f"turn.content.{_shown(name)}"
            for name, value in part.items()
            if name not in ("type", "text") and not _is_absent(value)
        )
    return "".join(texts)


def _check_call(index: int, call: Any) -> dict[str, Any]:
    """One tool call without nulls, its arguments as an object where they are JSON of one."""
    if not isinstance(call, dict):
        raise RowError(f"turn {index} has a tool call of type {type(call).__name__}, no object")
    where = f"turn {index}: tool_calls"
    clean: dict[str, Any] = _check_json(call, where)
    function = clean.get("function", clean)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"turn {index} has a tool call without a function name")
    if isinstance(arguments := function.get("arguments"), str):
        parsed = _parse_json(arguments)
        if isinstance(parsed, dict):  # chat templates write objects, not JSON of them
            function["arguments"] = _check_json(parsed, where, keep_nulls=True)
    return clean


def _check_tools(tools: Any) -> list[dict[str, Any]] | None:
    if _is_absent(tools) or (isinstance(tools, str) and not tools.strip()):
        return None
    is_text = isinstance(tools, str)
    found = _parse_json(tools) if is_text else tools
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowError("`tools` is no list of function definitions, nor JSON of one")
    return [_check_json(tool, "`tools`", keep_nulls=is_text) for tool in found] or None


def _parse_json(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_json(value: Any, where: str, *, keep_nulls: bool = False, depth: int = 0) -> Any:
    """A copy of `value`, which must be plain JSON; objects lose their null fields."""
    if depth > _MAX_DEPTH:
        raise RowError(f"{where} is nested deeper than {_MAX_DEPTH} levels")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    check = functools.partial(_check_json, where=where, keep_nulls=keep_nulls, depth=depth + 1)
    if isinstance(value, list):
        return [check(item) for item in value]
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if keep_nulls or item is not None}
        return {name: check(item) for name, item in kept.items()}
    raise RowError(f"{where} holds a {type(value).__name__}, which is not JSON")
