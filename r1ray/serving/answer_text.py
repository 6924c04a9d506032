"""The text of an answer while its tokens arrive: whole characters, cut before a stop string.

A stop string may begin in one token and end in a later one. Text that may be the beginning of one
is therefore held back, at most one character less than the longest stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from r1ray.models.requests import FinishReason, TokenEvent
from r1ray.models.sampling import SampledToken
from r1ray.models.tokenizer import StreamDecoder, Tokenizer

__all__ = ["AnswerText", "AnswerToken", "Piece", "StopStrings", "join_pieces"]


@dataclass(frozen=True)
class AnswerToken:
    """A token whose log-probability was asked for.

    Attributes:
        text: of the token by itself.
        offset: characters of the answer before it, text that is held back included.
        top: (text, log-probability) of the likeliest tokens in its place.
    """

    text: str
    logprob: float
    offset: int
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What an answer grows by.

    Attributes:
        reason: why the answer ends with it, or None.
        tokens: those that arrived; their text may come with a later piece, or be cut off.
    """

    text: str
    reason: FinishReason | None = None
    tokens: tuple[AnswerToken, ...] = ()


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """All of them as one."""
    return Piece(
        "".join([piece.text for piece in pieces]),
        pieces[-1].reason if pieces else None,
        tuple([token for piece in pieces for token in piece.tokens]),
    )


class StopStrings:
    """Releases text up to the first stop string, however the text is cut into pieces.

    The stop string that is complete first ends the text; of several complete at the same character,
    the longest.

    Attributes:
        hit: a stop string was found; nothing is released after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """What of the text so far is certainly part of the answer and was not released before."""
        if self.hit:
            return ""
        self._held += text
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if found:
            self.hit = True
            cut = min(found)[1]
        else:
            cut = len(self._held) - self._num_held()
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def finish(self) -> str:
        """The held-back text, when no more is to come."""
        released, self._held = "" if self.hit else self._held, ""
        return released

    def _num_held(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """Turns the token events of one request into text.

    Attributes:
        num_tokens: tokens read so far, the one that ended the sequence not counted.
        num_cached: tokens of the prompt that the model knew.
        finish_reason: why the answer ended, or None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._length = 0  # of the text, that held back included
        self.num_tokens = 0
        self.num_cached = 0
        self.finish_reason: FinishReason | None = None

    def push(self, events: Sequence[TokenEvent]) -> Piece:
        """What `events` add; those behind the end of the answer are ignored."""
        tokens: list[AnswerToken] = []
        text = "".join([self._push_one(event, tokens) for event in events])
        return Piece(text, self.finish_reason, tuple(tokens))

    def _push_one(self, event: TokenEvent, tokens: list[AnswerToken]) -> str:
        if self.finish_reason is not None:
            return ""
        fresh = ""
        self.num_cached = event.num_cached
        if event.token_id is not None:
            self.num_tokens += 1
            if event.sampled is not None:
                tokens.append(self._describe(event.sampled))
            decoded = self._decoder.push(event.token_id)
            self._length += len(decoded)
            fresh = self._stops.push(decoded)
        if event.finish_reason is not None:
            fresh += self._stops.push(self._decoder.finish())
            fresh += self._stops.finish()
        self.finish_reason = "stop" if self._stops.hit else event.finish_reason
        return fresh

    def _describe(self, sampled: SampledToken) -> AnswerToken:
        assert sampled.logprob is not None, "it was asked for"
        spell = self._tokenizer.spell
        return AnswerToken(
            text=spell([sampled.token_id]),
            logprob=sampled.logprob,
            offset=self._length,
            top=tuple([(spell([token]), value) for token, value in sampled.top_logprobs]),
        )
