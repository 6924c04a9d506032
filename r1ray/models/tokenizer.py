"""The tokenizer of a model directory: text to ids and back, chat messages to a prompt."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from r1ray.errors import ArtifactError
from r1ray.files import TABLE_BYTES, check_file

__all__ = ["TOKENIZER_FILES", "StreamDecoder", "Tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_BATCH_CHARS = 1 << 22  # encoded at once: a token takes some hundred bytes on the way
_MOST_BYTES = 4  # of a character
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A Hugging Face tokenizer, loaded from local files only."""

    template_errors = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
    """What `render_chat` raises for messages that the model's template does not accept."""

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer in the model directory `path`.

        Raises:
            ArtifactError: there is none, or it has no chat template or no end-of-turn token.
        """
        from transformers import AutoTokenizer

        for file in [Path(path) / name for name in TOKENIZER_FILES]:
            if file.exists():
                check_file(file, max_bytes=TABLE_BYTES)
        try:
            self._inner = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises that very class
            raise ArtifactError(f"{path}: no usable tokenizer ({error})") from error
        if not self._inner.chat_template:
            raise ArtifactError(f"{path}: the tokenizer has no chat template")
        if self._inner.eos_token_id is None:
            raise ArtifactError(
                f"{path}: the tokenizer has no eos_token; name the one that ends a turn in "
                "tokenizer_config.json"
            )

    @property
    def inner(self) -> Any:
        """The transformers tokenizer, for libraries that take one."""
        return self._inner

    @property
    def eos_token_id(self) -> int:
        return int(self._inner.eos_token_id)

    @property
    def eos_token(self) -> str:
        return str(self._inner.eos_token)

    @property
    def max_token_id(self) -> int:
        """The largest id that encoding can give."""
        return max(self._inner.get_vocab().values())

    @property
    def vocab_size(self) -> int:
        return len(self._inner)

    def vocabulary(self) -> dict[str, int]:
        """From every token to its id."""
        return dict(self._inner.get_vocab())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; control tokens inside it are read as such, none are added."""
        return list(self._inner.encode(text, add_special_tokens=False, verbose=False))

    def encode_batch_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """(token ids, first character of each token) of each text, int32 [T].

        Raises:
            ArtifactError: the tokenizer is not one of the `tokenizers` library.
        """
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is None:
            raise ArtifactError(f"{self._inner.name_or_path}: no fast tokenizer (tokenizer.json)")
        backend.no_truncation()  # a tokenizer.json may come with either
        backend.no_padding()
        first = operator.itemgetter(0)
        return [
            (
                np.array(encoding.ids, dtype=np.int32),
                np.fromiter(map(first, encoding.offsets), np.int32, len(encoding)),
            )
            for group in _group_texts(texts)
            for encoding in backend.encode_batch(group, add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without control tokens."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def spell(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens by their names."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The chat template applied to `messages`; with the header of an answer if asked.

        Args:
            tools: definitions of the functions that the template tells the model of.
        """
        return str(
            self._inner.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )


def _group_texts(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in order, in lists of at most _BATCH_CHARS or one text."""
    group: list[str] = []
    num_chars = 0
    for text in texts:
        if group and num_chars + len(text) > _BATCH_CHARS:
            yield group
            group, num_chars = [], 0
        group.append(text)
        num_chars += len(text)
    if group:
        yield group


class StreamDecoder:
    """Text of a growing token sequence, released only when its characters are complete.

    Tokens may end inside a character; that tail is held back until it decodes. What was released
    last is the context of what follows: whether a word begins with a space depends on it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens that were released last, all of them complete
        self._held: list[int] = []
        self._known = ""  # text of the context
        self._text = ""  # of what is held as well

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; may be empty."""
        text = self._decode([*self._context, *self._held, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # a control token, and not a space that a beginning hides
        self._text = text
        self._held.append(token_id)
        if text.endswith(_REPLACEMENT) and len(self._held) > _MOST_BYTES:
            return self._skip_broken()
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._known):
            return ""
        fresh = text[len(self._known) :]
        self._context, self._held = self._held, []
        self._known = self._text = self._decode(self._context)
        return fresh

    def finish(self) -> str:
        """The text that is still held back, incomplete characters replaced."""
        return self._decode([*self._context, *self._held])[len(self._known) :]

    def _skip_broken(self) -> str:
        """Text of more tokens than a character has bytes: the first are broken.

        What follows begins anew, without a context that would break it as well.
        """
        whole = [*self._context, *self._held]
        ends = range(1 - _MOST_BYTES, 0)  # the last may begin a character, which stays in one
        parts = ((end, self._decode(whole[:end]) + self._decode(whole[end:])) for end in ends)
        cut = next((end for end, text in parts if text == self._text), ends.start)
        for start in range(1, len(self._held)):
            if not self._decode(self._held[start:]).endswith(_REPLACEMENT):
                cut = start - len(self._held)  # or are one
                break
        broken = self._decode(whole[:cut])[len(self._known) :]
        begun = self._held[cut:]
        self._context, self._held, self._known, self._text = [], [], "", ""
        return broken + "".join(map(self.push, begun))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
