"""From messages to token ids with a mask of the tokens that the loss counts.

The prompt is the chat template up to the last answer; the answer's text and the end-of-turn token
follow as they are, so that templates which strip reasoning cannot remove it from the target. Every
earlier assistant turn that the template renders verbatim is a target as well.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1ray.data.sources import RowError
from r1ray.models.tokenizer import Tokenizer

__all__ = ["Sample", "tokenize_messages"]


@dataclass(frozen=True)
class Sample:
    """Token ids of one conversation, and for each whether it is a target of the loss."""

    input_ids: list[int]
    is_target: list[bool]
    was_truncated: bool = False


def tokenize_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    overflow: str,
) -> Sample:
    """The sample of one conversation that ends in an assistant turn.

    Args:
        overflow: `reject` or `truncate` what is longer than max_tokens.
    Raises:
        RowError: too long and rejected, truncated before any target, or not renderable.
    """
    text, spans = _render(tokenizer, messages)
    ids, starts = tokenizer.encode_with_offsets(text)
    is_target = [False] * len(ids)
    for begin, end in spans:
        for index, start in enumerate(starts):
            if begin <= start < end:
                is_target[index] = True
    sample = Sample(ids, is_target)
    if len(ids) > max_tokens:
        if overflow == "reject":
            raise RowError(f"{len(ids)} tokens, max_tokens is {max_tokens}")
        sample = dataclasses.replace(
            sample,
            input_ids=ids[:max_tokens],
            is_target=is_target[:max_tokens],
            was_truncated=True,
        )
    if not any(sample.is_target[1:]):
        raise RowError("no answer token is left within max_tokens")
    return sample


def _render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the [begin, end) characters of the targets."""
    spans = []
    try:
        prompt = tokenizer.render_chat(messages[:-1], add_generation_prompt=True)
        text = prompt + _without_overlap(prompt, messages[-1]["content"]) + tokenizer.eos_token
        for index, message in enumerate(messages[:-1]):
            if message["role"] != "assistant":
                continue
            before = tokenizer.render_chat(messages[:index], add_generation_prompt=True)
            answer = message["content"] + tokenizer.eos_token
            if text.startswith(before + answer):
                spans.append((len(before), len(before) + len(answer)))
    except tokenizer.template_errors as error:
        raise RowError(f"the chat template refuses it: {error}") from error
    spans.append((len(prompt), len(text)))
    return text, spans


def _without_overlap(prompt: str, answer: str) -> str:
    """`answer` without an opening tag that the template's answer header already ends in."""
    opening = "<think>\n"
    if prompt.endswith(opening) and answer.startswith(opening):
        return answer.removeprefix(opening)
    return answer
