"""Reasoning told apart from the answer: what stands in `<think></think>` at a reply's beginning.

A reply that the prompt has opened `<think>` for begins inside. Line breaks behind either tag belong
to neither. Without its end tag all of a reply is reasoning.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ReasoningSplitter", "SplitText", "opens_reasoning"]

_START, _END = "<think>", "</think>"


@dataclass(frozen=True)
class SplitText:
    """A piece of a reply; either part may be empty."""

    reasoning: str
    content: str


def opens_reasoning(prompt: str) -> bool:
    """Whether a reply to `prompt` begins inside `<think>`."""
    return prompt.rstrip().endswith(_START)


class ReasoningSplitter:
    """Splits a reply that comes in pieces; a tag may be cut anywhere.

    Args:
        is_open: the reply begins inside `<think>`.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._state: Literal["before", "reasoning", "content"] = (
            "reasoning" if is_open else "before"
        )
        self._held = ""  # may be the beginning of a tag
        self._skips_breaks = is_open

    def push(self, text: str) -> SplitText:
        """What of the text so far is certain, and was not given before."""
        self._held += text
        reasoning = ""
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith(_START):
                self._enter("reasoning", start[len(_START) :])
            elif not _START.startswith(start):  # nor can it become one
                self._state = "content"
        if self._state == "reasoning":
            before, end, behind = self._held.partition(_END)
            if end:
                reasoning = self._without_breaks(before)
                self._enter("content", behind)
            else:
                certain = len(before) - _overlap(before, _END)
                reasoning = self._without_breaks(before[:certain])
                self._held = before[certain:]
        content = ""
        if self._state == "content":
            content, self._held = self._without_breaks(self._held), ""
        return SplitText(reasoning, content)

    def finish(self) -> SplitText:
        """What was held back, when no more is to come."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return SplitText(self._without_breaks(held), "")
        return SplitText("", held)

    def _enter(self, state: Literal["reasoning", "content"], rest: str) -> None:
        self._state, self._held, self._skips_breaks = state, rest, True

    def _without_breaks(self, text: str) -> str:
        if self._skips_breaks:
            text = text.lstrip("\r\n")
            self._skips_breaks = not text
        return text


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)
