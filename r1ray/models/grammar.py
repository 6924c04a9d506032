"""Answers of a given form: JSON of a schema, or text of a regular expression.

The llguidance library says which tokens may come next. A form is a string that it reads; `check`
and `start` are given one.

Price: about 0.4 s and a trie of the vocabulary once for a tokenizer; 2 µs a character once for a
form of the last few, while other threads go on; then some 50 µs a token, and more where a form
first needs a new part of its automaton, within the library's limits.

Shape legend: V vocabulary.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import llguidance.hf
import torch
from llguidance import LLMatcher, LLParserLimits
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models.tokenizer import Tokenizer

__all__ = ["FormCompiler", "FormState", "choice_form", "json_form", "regex_form"]

_QUIET = 0  # no log lines about what a client sent
# A fifth of the library's own: the worst pattern takes 0.1 s and 50 MiB instead of 1 s and 250 MiB.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000)
_KEPT = 32  # forms that stay compiled: 2 MiB each at the size that a request may have


def json_form(schema: Mapping[str, Any]) -> str:
    """JSON of `schema`, without white space between its parts."""
    options: Any = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def regex_form(pattern: str) -> str:
    """Text that matches all of `pattern`, in the syntax of Rust's regex crate."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_form(choices: Sequence[str]) -> str:
    """One of `choices`."""
    texts = [json.dumps(choice, ensure_ascii=False) for choice in choices]
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")


class FormCompiler:
    """Forms for one tokenizer's tokens. Thread-safe.

    Args:
        vocab_size: the model's, which may be above the tokenizer's.
        stop_token_ids: that may end an answer where its form is complete.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, stop_token_ids: Iterable[int]
    ) -> None:
        self._tokens = llguidance.hf.from_tokenizer(
            tokenizer.inner, n_vocab=vocab_size, eos_token=sorted(stop_token_ids)
        )
        self._compiling = threading.Lock()
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # the latest used last

    def start(self, form: str) -> "FormState":
        """The state of an answer that has no token yet.

        Raises:
            ShapeError: `form` is not one, or is too complex.
        """
        state = self._find(form)
        if state is not None:
            return state
        with self._compiling:  # one at a time, and what others wait for only once
            if (state := self._find(form)) is not None:
                return state
            matcher = self._compile(form)
            with self._lock:
                self._compiled[form] = matcher
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
                return FormState(matcher.deep_copy(), self._tokens.vocab_size)

    def _find(self, form: str) -> "FormState | None":
        with self._lock:
            matcher = self._compiled.get(form)
            if matcher is None:
                return None
            self._compiled.move_to_end(form)
            return FormState(matcher.deep_copy(), self._tokens.vocab_size)

    def _compile(self, form: str) -> LLMatcher:
        message = LLMatcher.validate_grammar(form, self._tokens, limits=_LIMITS)
        matcher = LLMatcher(self._tokens, form, log_level=_QUIET, limits=_LIMITS)
        if message or matcher.is_error():
            raise ShapeError(f"no such form: {_first_line(message or matcher.get_error())}")
        return matcher


class FormState:
    """How far one answer has come."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def restrict(self, logits_V: Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place.

        Raises:
            ShapeError: the form has become too complex, or nothing may follow.
        """
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        may_follow_V = bits.flatten()[: len(logits_V)].bool()
        if not may_follow_V.any():
            raise ShapeError("no token can follow in the form that was asked for")
        logits_V.masked_fill_(~may_follow_V, float("-inf"))

    def accept(self, token_id: int) -> None:
        """Go on behind a token that `restrict` has left."""
        self._matcher.consume_token(token_id)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ShapeError(f"the form: {_first_line(self._matcher.get_error())}")


def _first_line(message: str) -> str:
    return " ".join(message.strip().splitlines()[:1])[:300]
