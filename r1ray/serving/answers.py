"""The JSON bodies of answers and chunks, for chat and for plain completions."""

import time
from abc import ABC, abstractmethod
from typing import Any

from r1ray.models.generation import FinishReason
from r1ray.serving.openai_schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Delta,
    Usage,
)

__all__ = ["AnswerFormat", "ChatFormat", "CompletionFormat"]


class AnswerFormat(ABC):
    """Builds the bodies of one answer; all of them carry the same id, time and model name."""

    def __init__(self, answer_id: str, model_name: str) -> None:
        self.id = answer_id
        self._header: dict[str, Any] = {
            "id": answer_id,
            "created": int(time.time()),
            "model": model_name,
        }

    @abstractmethod
    def whole(self, text: str, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""

    @abstractmethod
    def piece(self, text: str) -> dict[str, Any]:
        """A chunk that adds `text`."""

    @abstractmethod
    def closing(self, reason: FinishReason) -> dict[str, Any]:
        """The chunk that ends the text."""

    @abstractmethod
    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk behind it, with the token counts and no choices."""


class ChatFormat(AnswerFormat):
    """`chat.completion` and `chat.completion.chunk`."""

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        choice = ChatChoice(message=AnswerMessage(content=text), finish_reason=reason)
        return ChatCompletion(**self._header, choices=[choice], usage=usage).model_dump()

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(Delta(role="assistant", content=""), None)]

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk(Delta(content=text), None)

    def closing(self, reason: FinishReason) -> dict[str, Any]:
        return self._chunk(Delta(), reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return ChatChunk(**self._header, choices=[], usage=usage).model_dump()

    def _chunk(self, delta: Delta, reason: FinishReason | None) -> dict[str, Any]:
        choice = ChatChunkChoice(delta=delta, finish_reason=reason)
        chunk = ChatChunk(**self._header, choices=[choice]).model_dump(exclude={"usage"})
        chunk["choices"][0]["delta"] = delta.model_dump(exclude_none=True)
        return chunk


class CompletionFormat(AnswerFormat):
    """`text_completion`, whole and in chunks."""

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        choice = CompletionChoice(text=text, finish_reason=reason)
        return Completion(**self._header, choices=[choice], usage=usage).model_dump()

    def opening(self) -> list[dict[str, Any]]:
        return []

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk(text, None)

    def closing(self, reason: FinishReason) -> dict[str, Any]:
        return self._chunk("", reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return Completion(**self._header, choices=[], usage=usage).model_dump()

    def _chunk(self, text: str, reason: FinishReason | None) -> dict[str, Any]:
        choice = CompletionChoice(text=text, finish_reason=reason)
        return Completion(**self._header, choices=[choice]).model_dump(exclude={"usage"})
