"""Inputs that are nearly valid: random bytes, valid text with pieces changed, valid trees likewise.

What is changed is drawn by hypothesis, so that a failure comes out as the smallest change to a
valid input that provokes it. Drawing takes longer than most parsers do, so every draw is a batch:
each of its changes alone, and each with the next one.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

__all__ = ["Dump", "nearly"]

Dump = Callable[[Any], bytes]
"""Writes a tree in the format of a parser."""

Change = TypeVar("Change")

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, 1e308, -0.0,
    float("inf"), float("nan"), "", " ", "x", "null", "1", "1e999", "\x00", "\n", "\ud800", "é",
    "\u2028", "x" * 300, "../..", "//etc", "/", ".", "a/../b", "-1", "type", [], [[]], [None], {},
    {"": ""}, {"type": "files"}, {"a": {"b": 1}}, [1, "a"], [1] * 300,
)  # fmt: skip
JSON_TOKENS: tuple[bytes, ...] = (
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b'"', b"\\", b"\\ud800", b"\\u0000", b"{", b"}",
    b"[", b"]", b",", b":", b"\n", b"\r\n", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"-",
    b"null", b"true", b"9" * 5000, b"[" * 70, b"[" * 3000, b'{"a":' * 70, b'{"a":' * 3000,
    b'{"":1}', b'"\\ud800":1,',
)  # fmt: skip


def nearly(
    valid: Sequence[Any], dump: Dump, tokens: Sequence[bytes] = JSON_TOKENS
) -> st.SearchStrategy[list[bytes]]:
    """Batches of bytes that are like one of `valid` as `dump` writes it, or like nothing.

    Args:
        tokens: pieces that mean something to the parser, put in at random places.
    """
    texts = st.sampled_from([dump(tree) for tree in valid])
    trees = st.tuples(st.sampled_from(valid), _several(_tree_changes()))
    edits = st.tuples(texts, _several(_text_changes(tokens)))
    noise = st.lists(st.sampled_from(tokens) | st.binary(max_size=8), max_size=12)
    changed = trees.map(
        lambda drawn: [dump(_change_tree(drawn[0], part)) for part in _parts(drawn[1])]
    )
    edited = edits.map(lambda drawn: [_change_text(drawn[0], part) for part in _parts(drawn[1])])
    return changed | changed | edited | edited | noise.map(lambda pieces: [b"".join(pieces)])


def _several(changes: st.SearchStrategy[Change]) -> st.SearchStrategy[list[Change]]:
    return st.lists(changes, min_size=1, max_size=12)


def _parts(changes: Sequence[Change]) -> list[Sequence[Change]]:
    """Each change alone, and each with the next."""
    alone = [changes[index : index + 1] for index in range(len(changes))]
    return alone + [changes[index : index + 2] for index in range(len(changes) - 1)]


def _tree_changes() -> st.SearchStrategy[tuple[int, str, Any]]:
    """(place, what to do there, a value to do it with)."""
    values = st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=5)
    kinds = st.sampled_from(("replace", "replace", "remove", "add", "rename", "nest", "move"))
    return st.tuples(st.integers(0, 999), kinds, values)


def _change_tree(tree: Any, changes: Sequence[tuple[int, str, Any]]) -> Any:
    tree = copy.deepcopy(tree)
    for place, kind, value in changes:
        found = list(_places(tree))
        if not found:
            return tree
        holder, key = found[place % len(found)]
        if kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[value if isinstance(value, str) else json.dumps(value)] = holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        elif kind == "nest":
            holder[key] = _nest(holder[key], 70 if place % 2 else 1)
        elif kind == "move":
            holder[key] = copy.deepcopy(found[place * 7 % len(found)][0])
        else:
            holder[key] = copy.deepcopy(value)
    return tree


def _nest(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in `tree`."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _text_changes(tokens: Sequence[bytes]) -> st.SearchStrategy[tuple[int, int, bytes]]:
    """(where, how many bytes go, what comes)."""
    gone = st.sampled_from((0, 0, 1, 3, 20))
    return st.tuples(st.integers(0, 4095), gone, st.sampled_from(tokens) | st.binary(max_size=3))


def _change_text(text: bytes, changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    for place, num_gone, token in changes:
        start = place % (len(text) + 1)
        text = text[:start] + token + text[start + num_gone :]
    return text
