"""Four families of problems about short strings, unlike enough that one is unlearned with another.

A problem is `tag question>answer`, in an alphabet of 38 characters; the tag says which family it is
of. Families share characters and lengths but no rule: order, sorting, places, the alphabet.
Held-out problems are drawn from other seeds, and training leaves out their questions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.models.batch_generation import generate_batch
from r1ray.models.decoder import Decoder

__all__ = ["FAMILIES", "VOCAB_SIZE", "StringProblem", "accuracy", "draw", "encode", "to_batch"]

_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 >"
_EOS = 1
_FIRST = 2  # 0 is padding
VOCAB_SIZE = _FIRST + len(_ALPHABET)
_LETTERS, _DIGITS = _ALPHABET[:26], _ALPHABET[26:36]


@dataclass(frozen=True)
class StringProblem:
    """What is asked, and the one right answer."""

    family: str
    question: str
    answer: str


def _reverse(chance: random.Random) -> tuple[str, str]:
    word = "".join(chance.choices(_LETTERS, k=chance.randint(3, 6)))
    return word, word[::-1]


def _sort(chance: random.Random) -> tuple[str, str]:
    digits = "".join(chance.choices(_DIGITS, k=chance.randint(3, 6)))
    return digits, "".join(sorted(digits))


def _every_other(chance: random.Random) -> tuple[str, str]:
    word = "".join(chance.choices(_LETTERS, k=chance.randint(3, 6)))
    return word, word[::2]


def _shift(chance: random.Random) -> tuple[str, str]:
    word = "".join(chance.choices(_LETTERS, k=chance.randint(3, 6)))
    return word, "".join(_LETTERS[(_LETTERS.index(letter) + 3) % 26] for letter in word)


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "sort": _sort,
    "every_other": _every_other,
    "shift": _shift,
}


def draw(
    family: str, count: int, *, seed: int, without: Sequence[StringProblem] = ()
) -> list[StringProblem]:
    """`count` problems with distinct questions, none of which is in `without`."""
    chance = random.Random(f"{family}-{seed}")
    taken = {problem.question for problem in without}
    problems: list[StringProblem] = []
    while len(problems) < count:
        question, answer = FAMILIES[family](chance)
        if question not in taken:
            taken.add(question)
            problems.append(StringProblem(family, question, answer))
    return problems


def _ids(text: str) -> list[int]:
    return [_FIRST + _ALPHABET.index(character) for character in text]


def _prompt(problem: StringProblem) -> list[int]:
    return _ids(f"{problem.family[0]}{problem.family[-1]} {problem.question}>")


def encode(problem: StringProblem) -> tuple[list[int], list[bool]]:
    """(tokens, whether each is a target: those of the answer and its end)."""
    prompt, answer = _prompt(problem), [*_ids(problem.answer), _EOS]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def to_batch(samples: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> MicroBatch:
    """Samples of `encode`, padded to the longest."""
    columns = max(len(ids) for ids, _ in samples)
    input_ids_BT = torch.zeros(len(samples), columns, dtype=torch.long)
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    for row, (ids, is_target) in enumerate(samples):
        ids_T = torch.tensor(ids)
        input_ids_BT[row, : len(ids)] = ids_T
        shown_T = torch.where(torch.tensor(is_target), ids_T, IGNORED)
        labels_BT[row, : len(ids) - 1] = shown_T[1:]
    num_targets = int((labels_BT != IGNORED).sum())
    return MicroBatch(input_ids_BT, labels_BT, sum(len(ids) for ids, _ in samples), num_targets)


@torch.inference_mode()
def accuracy(model: Decoder, problems: Sequence[StringProblem]) -> float:
    """Share of `problems` whose greedy answer is right, to the last character."""
    model.eval()
    outputs = generate_batch(
        model,
        [_prompt(problem) for problem in problems],
        max_new_tokens=10,
        stop_token_ids=frozenset({_EOS}),
        max_concurrency=128,
    )
    model.train()
    right = [
        list(output) in (_ids(problem.answer), [*_ids(problem.answer), _EOS])
        for output, problem in zip(outputs, problems, strict=True)
    ]
    return sum(right) / len(right)
