"""R1-style traces for reasoning-gym task families, each step computed, each trace verified.

1. A family's generator draws problems from a seed; the trace writer of that family computes the
   steps from the problem's metadata and never looks at the expected answer.
2. The trace becomes `<think>steps</think>` and the answer; the family's own scorer must give the
   answer full marks, else the trace is an error in the writer and is raised.
3. Held-out problems come from seeds that training never uses, and a training problem whose question
   also occurs held out is skipped.

Adding a family means adding one writer to `_WRITERS`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1ray.config.prepare import FamilyConfig, TasksConfig
from r1ray.errors import ConfigError

__all__ = [
    "TRACES_NAME",
    "Problem",
    "build_messages",
    "draw_heldout",
    "draw_training",
    "read_questions",
    "supported_families",
]

TRACES_NAME = "traces.jsonl"  # beside a BatchSet


@dataclass(frozen=True)
class Problem:
    """One verifiable problem; `score` judges an answer text with the family's own scorer."""

    family: str
    question: str
    answer: str
    entry: Mapping[str, Any]
    scorer: Callable[..., float]

    def score(self, answer: str | None) -> float:
        """1.0 for a correct answer; families may give less to a partly correct one."""
        return float(self.scorer(answer=answer, entry=dict(self.entry)))

    def trace(self) -> str:
        """The full answer text: reasoning inside <think></think>, then the answer.

        Raises:
            ConfigError: the computed answer does not get full marks: the writer does not cover the
                family's options.
        """
        thought, answer = _WRITERS[self.family](self.entry["metadata"])
        if self.score(answer) != 1.0:
            raise ConfigError(
                f"tasks.families: the trace writer of {self.family} does not cover its options; "
                f"for {self.question!r} it ends in {answer!r}, not {self.answer!r}"
            )
        return f"<think>\n{thought}\n</think>\n{answer}"


def supported_families() -> list[str]:
    """Names of the families that traces can be written for."""
    return sorted(_WRITERS)


def build_messages(problem: Problem, system_prompt: str) -> list[dict[str, str]]:
    """The system and user turns that pose `problem`."""
    return [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": problem.question.strip()},
    ]


def draw_heldout(tasks: TasksConfig, count: int) -> list[Problem]:
    """`count` held-out problems with distinct questions, families in turn."""
    streams = [_draw(family, tasks.heldout_seed) for family in tasks.families]
    return _take_distinct(streams, count, seen=set())


def draw_training(tasks: TasksConfig, count: int, heldout: Sequence[Problem]) -> list[Problem]:
    """`count` training problems with distinct questions, none of which is in `heldout`."""
    streams = [_draw(family, tasks.train_seed) for family in tasks.families]
    return _take_distinct(streams, count, seen={problem.question for problem in heldout})


def read_questions(directory: Path) -> set[str]:
    """The questions of the traces that a BatchSet in `directory` was made of."""
    file = directory / TRACES_NAME
    if not file.is_file():
        return set()
    with file.open(encoding="utf-8") as stream:
        return {
            message["content"]
            for line in stream
            for message in json.loads(line)["messages"]
            if message["role"] == "user"
        }


_MAX_REPEATS = 2000  # drawn in a row without a new question: the family has no more


def _take_distinct(
    streams: list[Iterator[Problem]], count: int, *, seen: set[str]
) -> list[Problem]:
    taken: list[Problem] = []
    while len(taken) < count:
        stream = streams[len(taken) % len(streams)]
        for _ in range(_MAX_REPEATS):
            problem = next(stream)
            if problem.question not in seen:
                break
        else:
            raise ConfigError(
                f"tasks.families: {problem.family} has too few distinct problems for "
                f"{count} samples; widen its options or ask for fewer"
            )
        seen.add(problem.question)
        taken.append(problem)
    return taken


_BLOCK = 500  # problems per generator; reasoning-gym draws item i from seed + i
_TRAIN_SEED_LIMIT = 10**6  # held-out seeds start here (`TasksConfig`)


def _draw(family: FamilyConfig, first_seed: int) -> Iterator[Problem]:
    if family.name not in _WRITERS:
        raise ConfigError(
            f"tasks.families: no trace writer for {family.name!r}; "
            f"choose from {', '.join(supported_families())}"
        )
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("tasks need reasoning-gym; install r1ray[demo]") from error
    for seed in range(first_seed, 2**31, _BLOCK):
        if first_seed < _TRAIN_SEED_LIMIT <= seed + _BLOCK:
            raise ConfigError(f"tasks.families: {family.name} ran out of training seeds")
        try:
            dataset = reasoning_gym.create_dataset(
                family.name, seed=seed, size=_BLOCK, **family.options
            )
            dataset[0]  # some options are only found impossible here
        except (TypeError, AssertionError, ValueError, LookupError) as error:
            raise ConfigError(
                f"tasks.families: reasoning-gym refuses options {family.options} for "
                f"{family.name}: {error}"
            ) from error
        for index in range(_BLOCK):
            entry = dataset[index]
            yield Problem(
                family.name, entry["question"], entry["answer"], entry, dataset.score_answer
            )


def _write_chain_sum(metadata: Mapping[str, Any]) -> tuple[str, str]:
    first, *rest = metadata["expression"].split()
    total = int(first)
    steps = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join(steps), str(total)


def _write_word_sequence_reversal(metadata: Mapping[str, Any]) -> tuple[str, str]:
    words = metadata["words"]
    numbered = [f"{index} {word}" for index, word in enumerate(words, start=1)]
    return "\n".join(numbered), ", ".join(reversed(words))


def _write_number_filtering(metadata: Mapping[str, Any]) -> tuple[str, str]:
    action, size = metadata["operation"].split("_")
    limit = float(metadata["filter_value"])
    sign = "<" if size == "smaller" else ">"
    steps, kept = [], []
    for text in metadata["original_numbers"]:
        holds = float(text) < limit if size == "smaller" else float(text) > limit
        keeps = holds == (action == "keep")
        steps.append(f"{text} {sign} {metadata['filter_value']} {'yes' if holds else 'no'}")
        kept += [text] if keeps else []
    return "\n".join(steps), str(kept)


def _write_spell_backward(metadata: Mapping[str, Any]) -> tuple[str, str]:
    word = metadata["word"]
    return f"{' '.join(word)}\n{' '.join(reversed(word))}", word[::-1]


def _write_letter_counting(metadata: Mapping[str, Any]) -> tuple[str, str]:
    letter, total, steps = metadata["target_letter"], 0, []
    for word in metadata["span"]:
        spelled = " ".join(word.lower())
        total += word.lower().count(letter)
        steps.append(f"{spelled}: {total}")
    return "\n".join(steps), str(total)


def _write_leg_counting(metadata: Mapping[str, Any]) -> tuple[str, str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, steps = 0, []
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{count} x {ANIMALS[animal]} = {legs}, {total} + {legs} = {total + legs}")
        total += legs
    return "\n".join(steps), str(total)


def _write_gcd(metadata: Mapping[str, Any]) -> tuple[str, str]:
    numbers = list(metadata["numbers"])
    steps = []
    divisor = numbers[0]
    for number in numbers[1:]:
        low, high = sorted((divisor, number))
        while low:
            steps.append(f"{high} = {high // low} x {low} + {high % low}")
            low, high = high % low, low
        divisor = high
    return "\n".join(steps), str(divisor)


_WRITERS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str]]] = {
    "chain_sum": _write_chain_sum,
    "gcd": _write_gcd,
    "leg_counting": _write_leg_counting,
    "letter_counting": _write_letter_counting,
    "number_filtering": _write_number_filtering,
    "spell_backward": _write_spell_backward,
    "word_sequence_reversal": _write_word_sequence_reversal,
}
