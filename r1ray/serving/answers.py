"""The JSON bodies of answers and chunks, for chat and for plain completions."""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from r1ray.models.requests import FinishReason
from r1ray.serving.answer_text import AnswerToken, Piece
from r1ray.serving.openai_answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from r1ray.serving.reasoning import ReasoningSplitter

__all__ = ["AnswerFormat", "ChatFormat", "CompletionFormat"]


class AnswerFormat(ABC):
    """Builds the bodies of one request; all of them carry the same id, time and model name.

    Args:
        has_logprobs: whether the request asked for log-probabilities.
    """

    def __init__(self, answer_id: str, model_name: str, *, has_logprobs: bool) -> None:
        self.id = answer_id
        self._has_logprobs = has_logprobs
        self._header: dict[str, Any] = {
            "id": answer_id,
            "created": int(time.time()),
            "model": model_name,
        }

    @abstractmethod
    def whole(self, answers: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """All answers, each in one piece, which has a reason."""

    @abstractmethod
    def opening(self, index: int) -> list[dict[str, Any]]:
        """The chunks before the first text of answer `index`."""

    @abstractmethod
    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Those that add `piece` to answer `index`, and end it where it ends."""

    @abstractmethod
    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk behind them all, with the token counts and no choices."""


class ChatFormat(AnswerFormat):
    """`chat.completion` and `chat.completion.chunk`; reasoning is told apart.

    Args:
        is_open: answers begin inside `<think>`.
    """

    def __init__(
        self, answer_id: str, model_name: str, *, has_logprobs: bool, is_open: bool
    ) -> None:
        super().__init__(answer_id, model_name, has_logprobs=has_logprobs)
        self._splitters = defaultdict[int, ReasoningSplitter](
            lambda: ReasoningSplitter(is_open=is_open)
        )

    def whole(self, answers: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            ChatChoice(
                message=AnswerMessage(**self._split(index, answer)),
                finish_reason=_reason(answer),
                index=index,
                logprobs=self._logprobs(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(**self._header, choices=choices, usage=usage).model_dump()

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(Delta(role="assistant", content=""), index=index)]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        parts = {name: text for name, text in self._split(index, piece).items() if text}
        found = []
        if parts or piece.tokens:
            logprobs = self._logprobs(piece)
            found.append(self._chunk(Delta(**parts), index=index, logprobs=logprobs))
        if piece.reason is not None:
            found.append(self._chunk(Delta(), index=index, finish_reason=piece.reason))
        return found

    def usage(self, usage: Usage) -> dict[str, Any]:
        return ChatChunk(**self._header, choices=[], usage=usage).model_dump()

    def _chunk(self, delta: Delta, **fields: Any) -> dict[str, Any]:
        choice = ChatChunkChoice(delta=delta, **fields)
        chunk = ChatChunk(**self._header, choices=[choice]).model_dump(exclude={"usage"})
        chunk["choices"][0]["delta"] = delta.model_dump(exclude_none=True)
        return chunk

    def _split(self, index: int, piece: Piece) -> dict[str, Any]:
        """The fields of a message or delta that hold text."""
        splitter = self._splitters[index]
        parts = [splitter.push(piece.text)]
        if piece.reason is not None:
            parts.append(splitter.finish())
        reasoning = "".join([part.reasoning for part in parts]) or None
        content = "".join([part.content for part in parts])
        return {"content": content, "reasoning_content": reasoning, "reasoning": reasoning}

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **_describe(token.text, token.logprob),
                    top_logprobs=[TopLogprob(**_describe(*item)) for item in token.top],
                )
                for token in piece.tokens
            ]
        )


class CompletionFormat(AnswerFormat):
    """`text_completion`, whole and in chunks."""

    def whole(self, answers: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            CompletionChoice(
                text=answer.text,
                finish_reason=_reason(answer),
                index=index,
                logprobs=self._logprobs(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return Completion(**self._header, choices=choices, usage=usage).model_dump()

    def opening(self, index: int) -> list[dict[str, Any]]:  # noqa: ARG002
        return []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        found = []
        if piece.text or piece.tokens:
            logprobs = self._logprobs(piece)
            found.append(self._chunk(text=piece.text, index=index, logprobs=logprobs))
        if piece.reason is not None:
            found.append(self._chunk(text="", index=index, finish_reason=piece.reason))
        return found

    def usage(self, usage: Usage) -> dict[str, Any]:
        return Completion(**self._header, choices=[], usage=usage).model_dump()

    def _chunk(self, **fields: Any) -> dict[str, Any]:
        choice = CompletionChoice(**fields)
        return Completion(**self._header, choices=[choice]).model_dump(exclude={"usage"})

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        return CompletionLogprobs(
            tokens=[token.text for token in piece.tokens],
            token_logprobs=[token.logprob for token in piece.tokens],
            top_logprobs=[_by_text(token) for token in piece.tokens],
            text_offset=[token.offset for token in piece.tokens],
        )


def _describe(text: str, logprob: float) -> dict[str, Any]:
    is_whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode()) if is_whole else None,
    }


def _by_text(token: AnswerToken) -> dict[str, float]:
    """The likeliest tokens and the one chosen; of equal texts the likelier."""
    found = {token.text: token.logprob}
    for text, logprob in token.top:
        found[text] = max(logprob, found.get(text, logprob))
    return found


def _reason(answer: Piece) -> FinishReason:
    assert answer.reason is not None, "an answer ends with a reason"
    return answer.reason
