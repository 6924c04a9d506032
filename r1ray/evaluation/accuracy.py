"""Verifier accuracy: greedy answers to held-out problems, judged by the families' own scorers."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from r1ray.data.reasoning import Problem, build_messages
from r1ray.models.batch_generation import generate_batch
from r1ray.models.decoder import Decoder
from r1ray.models.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "Proportion",
    "answer_problems",
    "extract_answer",
    "paired_difference",
    "proportion",
]

_THINK_END = "</think>"


@dataclass(frozen=True)
class Answer:
    """A model's reply to one problem.

    Attributes:
        is_correct: the text after </think> gets full marks from the family's scorer.
        mentions_answer: the expected answer stands in the reply's last line, whatever its form;
            it separates knowing the answer from keeping to the format.
    """

    family: str
    question: str
    expected: str
    reply: str
    is_correct: bool
    mentions_answer: bool


@dataclass(frozen=True)
class Proportion:
    """A share with its 95% Wilson score interval."""

    value: float
    low: float
    high: float
    count: int


def proportion(successes: Sequence[bool]) -> Proportion:
    """The share of True with its 95% interval.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    n, z = len(successes), 1.959964
    share = sum(successes) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounded, the ends of shares of 0 and 1 would be a little inside.
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Proportion(share, low, high, n)


def paired_difference(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float, float]:
    """(mean of first - second, its 95% interval low, high) over the same problems, in shares.

    Both have a score from 0 to 1, or whether it is right, for each problem.

    Source: percentile bootstrap over problems, Efron 1979; 10,000 resamples, seeded.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    size = len(differences)
    # A resample is told by how often it has each of the few differences that there are.
    values, times = np.unique(differences, return_counts=True)
    counts = np.random.default_rng(0).multinomial(size, times / size, 10_000)
    low, high = np.percentile(counts @ values / size, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def extract_answer(reply: str) -> str:
    """The text after the last </think>; the whole reply where there is none."""
    return reply.rpartition(_THINK_END)[2].strip()


def answer_problems(
    model: Decoder,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    system_prompt: str,
    *,
    max_new_tokens: int,
    max_concurrency: int,
    on_finish: Callable[[int], None],
) -> list[Answer]:
    """Greedy replies to `problems`, in their order, judged."""
    prompts = [
        tokenizer.encode(
            tokenizer.render_chat(
                build_messages(problem, system_prompt), add_generation_prompt=True
            )
        )
        for problem in problems
    ]
    outputs = generate_batch(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset({tokenizer.eos_token_id, *model.config.eos_token_ids}),
        max_concurrency=max_concurrency,
        on_finish=on_finish,
    )
    return [
        _judge(problem, tokenizer.decode(output))
        for problem, output in zip(problems, outputs, strict=True)
    ]


def _judge(problem: Problem, reply: str) -> Answer:
    lines = extract_answer(reply).splitlines() or [""]
    mention = rf"(?<![\w.-]){re.escape(problem.answer)}(?![\w]|\.\d)"
    return Answer(
        family=problem.family,
        question=problem.question,
        expected=problem.answer,
        reply=reply,
        is_correct=problem.score(extract_answer(reply)) == 1.0,
        mentions_answer=re.search(mention, lines[-1]) is not None,
    )
