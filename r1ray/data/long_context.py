"""Long-context tasks in RULER's manner, made here from nothing but Python's own documentation.

- `niah_single_1`: one number to be found in sentences that repeat.
- `niah_multikey_2`: the hay is needles: one number among many, each of another word.
- `niah_multikey_3`: the same with random hexadecimal strings for words and numbers.
- `vt`: variables that are given one another's value; all of one chain are asked for.
- `cwe`: the ten words that are common in a list of words.
- `fwe`: the three most frequent made-up words.

`build_passkey` hides a number at a given depth of the same sentences.

Every task is filled up to a number of tokens. A reply's score is the share of the expected strings
that are in it. `write_conversation` makes training samples: tasks with all their questions, and
windows of source code.

Sources: Hsieh et al. 2024, RULER, arXiv:2404.06654; passkeys: Mohtashami & Jaggi 2023,
arXiv:2305.16300.
"""

import dataclasses
import functools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from r1ray.data.texts import read_english, read_source_code
from r1ray.errors import ConfigError
from r1ray.models.tokenizer import Tokenizer

__all__ = [
    "TASKS",
    "LongTask",
    "build_long_task",
    "build_passkey",
    "score_reply",
    "write_conversation",
]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_COMMON, _COMMON_TIMES, _RARE_TIMES = 10, 30, 3
_CHAIN, _FREQUENT = 5, 3
_TASK_SHARE = 0.82  # of a sample: the rest is for further questions
_TEMPLATE_TOKENS = 60  # of a chat template, around one turn each
_CHARS_PER_TOKEN = 6  # at most, in source code: what is too much is cut
_FURTHER = 15  # questions about needles, besides the one that is asked


@dataclass(frozen=True)
class LongTask:
    """A text and a question, and the strings that its answer holds.

    Attributes:
        further: other questions about the same text, each with its answers.
    """

    text: str
    question: str
    answers: tuple[str, ...]
    further: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def prompt(self) -> str:
        """The text, and the question behind it."""
        return self.text + self.question

    def split(self) -> list["LongTask"]:
        """A task for each question, which all begin with the same text."""
        questions = [(self.question, self.answers), *self.further]
        return [LongTask(self.text, *of_question) for of_question in questions]

    def to_conversation(self) -> list[dict[str, str]]:
        """All questions and their answers, as the turns of a chat."""
        turns = [{"role": "user", "content": self.prompt}, _answer(self.answers)]
        for question, answers in self.further:
            turns += [{"role": "user", "content": question}, _answer(answers)]
        return turns


def build_long_task(
    name: str, count_tokens: Callable[[str], int], max_tokens: int, *, seed: int
) -> LongTask:
    """The task `name`, as long as fits `max_tokens`.

    Args:
        count_tokens: of a prompt, whatever is put around it included.
    Raises:
        ConfigError: there is no such task, or it does not fit at its shortest.
    """
    try:
        build = TASKS[name]
    except KeyError:
        raise ConfigError(f"no task {name!r}; there are {', '.join(TASKS)}") from None

    return _fill(
        name, lambda size: build(random.Random(f"{name} {seed}"), size), count_tokens, max_tokens
    )


def build_passkey(
    depth: float, count_tokens: Callable[[str], int], max_tokens: int, *, seed: int
) -> LongTask:
    """A number to be found in sentences that repeat, as many as fit `max_tokens`.

    Args:
        depth: share of the sentences before it, from 0 to 1.
        count_tokens: of a prompt, whatever is put around it included.
    Raises:
        ConfigError: it does not fit at its shortest.
    """
    key = random.Random(f"passkey {seed}").randrange(10_000, 100_000)

    def attempt(size: int) -> LongTask:
        hay = [_NOISE] * size
        hay.insert(
            round(depth * size), f"The pass key is {key}. Remember it. {key} is the pass key."
        )
        text = (
            "There is important information hidden inside a lot of irrelevant text. Find it and "
            "memorize it. I will quiz you about it.\n" + "\n".join(hay) + "\n"
        )
        return LongTask(text, "What is the pass key? The pass key is", (str(key),))

    return _fill("passkey", attempt, count_tokens, max_tokens)


def _fill(
    name: str,
    attempt: Callable[[int], LongTask],
    count_tokens: Callable[[str], int],
    max_tokens: int,
) -> LongTask:
    """The largest of `attempt`'s tasks that fits."""

    def count(size: int) -> int:
        return count_tokens(attempt(size).prompt)

    fits, size = 1, 2
    tokens_of_fits, tokens = count(fits), count(size)
    if tokens_of_fits > max_tokens:
        raise ConfigError(f"{name} does not fit {max_tokens} tokens at its shortest; raise them")
    while tokens <= max_tokens:
        fits, tokens_of_fits, size = size, tokens, 2 * size
        tokens = count(size)
    while size - fits > 1:  # tokens grow nearly evenly with the size
        share = (max_tokens - tokens_of_fits) / (tokens - tokens_of_fits)
        guess = min(max(fits + 1, fits + int(share * (size - fits))), size - 1)
        tokens_of_guess = count(guess)
        if tokens_of_guess <= max_tokens:
            fits, tokens_of_fits = guess, tokens_of_guess
        else:
            size, tokens = guess, tokens_of_guess
    return attempt(fits)


def write_conversation(
    tokenizer: Tokenizer, number: int, *, max_tokens: int, tasks: Sequence[str]
) -> list[dict[str, str]]:
    """The `number`-th training sample: one of `tasks`, each in turn.

    Tasks have a quarter to all of `max_tokens`, and what further questions take besides. Where
    there are none, the sample is a window of source code.

    Raises:
        ConfigError: the task does not fit, or there is no source code of that length.
    """
    rng = random.Random(number)
    if not tasks:
        return _recite(tokenizer, rng, max_tokens)
    name = tasks[number % len(tasks)]
    most = int(max_tokens * _TASK_SHARE)
    wanted = int(most * rng.uniform(0.25, 1.0))

    def count(text: str) -> int:
        return len(tokenizer.encode(text)) + _TEMPLATE_TOKENS

    try:
        task = build_long_task(name, count, wanted, seed=number)
    except ConfigError:
        task = build_long_task(name, count, most, seed=number)
    return _fit(tokenizer, task.to_conversation(), max_tokens)


def _fit(
    tokenizer: Tokenizer, turns: list[dict[str, str]], max_tokens: int
) -> list[dict[str, str]]:
    """The first question, and as many of the others as there is room for."""
    text = tokenizer.render_chat(turns, add_generation_prompt=False)
    tokens = len(tokenizer.encode(text)) + _TEMPLATE_TOKENS
    while tokens > max_tokens and len(turns) > 2:
        *turns, question, answer = turns
        tokens -= len(tokenizer.encode(question["content"] + answer["content"]))
    return turns


def _recite(tokenizer: Tokenizer, rng: random.Random, max_tokens: int) -> list[dict[str, str]]:
    """Source code as an answer: every token of it is a target."""
    code, chars = read_source_code(), _CHARS_PER_TOKEN * max_tokens
    if not max_tokens > _TEMPLATE_TOKENS or chars >= len(code):
        raise ConfigError(
            f"no window of {max_tokens} tokens in {len(code)} characters of source code; windows "
            f"have more than {_TEMPLATE_TOKENS} and up to {len(code) // _CHARS_PER_TOKEN} tokens"
        )
    start = rng.randrange(len(code) - chars)
    text = code[start : start + chars]
    [(_, starts)] = tokenizer.encode_batch_with_offsets([text])
    end = starts[: max_tokens - _TEMPLATE_TOKENS][-1]
    return [
        {"role": "user", "content": "Recite some of Python's source code."},
        {"role": "assistant", "content": text[:end]},
    ]


def score_reply(reply: str, answers: Sequence[str]) -> float:
    """Share of `answers` that are in `reply`, whatever their case."""
    lowered = reply.lower()
    return sum(answer.lower() in lowered for answer in answers) / len(answers)


def _niah_single_1(rng: random.Random, size: int) -> LongTask:
    word, number = rng.choice(_words()), _number(rng)
    hay = [_NOISE] * size
    hay.insert(rng.randrange(size + 1), _needle(word, number))
    return _ask_needle("\n".join(hay), "number", word, number)


def _niah_multikey_2(rng: random.Random, size: int) -> LongTask:
    keys = _distinct(size, lambda: f"{rng.choice(_words())}-{rng.choice(_words())}")
    return _among_needles(rng, keys, [_number(rng) for _ in keys], "number")


def _niah_multikey_3(rng: random.Random, size: int) -> LongTask:
    keys = _distinct(size, lambda: _hexadecimal(rng))
    return _among_needles(rng, keys, [_hexadecimal(rng) for _ in keys], "string")


def _among_needles(
    rng: random.Random, keys: Sequence[str], values: Sequence[str], kind: str
) -> LongTask:
    hay = "\n".join(map(functools.partial(_needle, kind=kind), keys, values))
    asked, *others = rng.sample(range(len(keys)), min(len(keys), 1 + _FURTHER))
    task = _ask_needle(hay, kind, keys[asked], values[asked])
    further = tuple((_question(kind, keys[at]), (values[at],)) for at in others)
    return dataclasses.replace(task, further=further)


def _vt(rng: random.Random, size: int) -> LongTask:
    names = _distinct(2 * _CHAIN, lambda: _letters(rng, 5).upper())
    chains = [names[:_CHAIN], names[_CHAIN:]]
    values = [str(rng.randrange(10_000, 100_000)) for _ in chains]
    steps = []
    for chain, value in zip(chains, values, strict=True):
        sources = [value, *(f"VAR {name}" for name in chain)]
        steps.append(
            [f"VAR {name} = {source}" for name, source in zip(chain, sources, strict=False)]
        )
    hay = [_NOISE] * size
    places = [sorted(rng.randrange(len(hay) + 1) for _ in chain) for chain in steps]
    placed = [
        (place, order, line)
        for spots, lines in zip(places, steps, strict=True)
        for order, (place, line) in enumerate(zip(spots, lines, strict=True))
    ]
    for place, _, line in sorted(placed, reverse=True):
        hay.insert(place, line)
    questions = [
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: the {_CHAIN} variables that are assigned the value {value} are:"
        for value in values
    ]
    text = (
        "Memorize and track the chains of variable assignment hidden in the following text.\n\n"
        + "\n".join(hay)
        + "\n\n"
    )
    further = ((questions[1], tuple(chains[1])),)
    return LongTask(text, questions[0], tuple(chains[0]), further)


def _cwe(rng: random.Random, size: int) -> LongTask:
    words = iter(rng.sample(_words(), len(_words())))
    words_then_letters = _distinct(_COMMON + size, lambda: next(words, "") or _letters(rng, 7))
    common, rare = words_then_letters[:_COMMON], words_then_letters[_COMMON:]
    listed = [*common * _COMMON_TIMES, *rare * _RARE_TIMES]
    rng.shuffle(listed)
    numbered = " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{numbered}\n"
    )
    question = (
        f"Question: What are the {_COMMON} most common words in the above list? Answer: The top "
        f"{_COMMON} words that appear most often in the list are:"
    )
    return LongTask(text, question, tuple(common))


def _fwe(rng: random.Random, size: int) -> LongTask:
    coded = _distinct(60, lambda: _letters(rng, 6))
    weights = [1.0 / (rank + 1) ** 2 for rank in range(len(coded))]
    counts = [max(1, round(20 * size * weight)) for weight in weights]
    listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
    rng.shuffle(listed)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words.\n{' '.join(listed)}\n"
    )
    question = (
        "Question: What are the three most frequently appeared words in the above coded text? "
        "Answer: the three most frequently appeared words are:"
    )
    return LongTask(text, question, tuple(coded[:_FREQUENT]))


TASKS: dict[str, Callable[[random.Random, int], LongTask]] = {
    "niah_single_1": _niah_single_1,
    "niah_multikey_2": _niah_multikey_2,
    "niah_multikey_3": _niah_multikey_3,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
}


def _needle(key: str, value: str, kind: str = "number") -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _ask_needle(hay: str, kind: str, key: str, value: str) -> LongTask:
    text = (
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize "
        f"them. I will quiz you about one of them afterwards.\n{hay}\n"
    )
    return LongTask(text, _question(kind, key), (value,))


def _question(kind: str, key: str) -> str:
    return (
        f"What is the special magic {kind} for {key} mentioned in the provided text? The special "
        f"magic {kind} for {key} mentioned in the provided text is"
    )


def _answer(answers: Sequence[str]) -> dict[str, str]:
    return {"role": "assistant", "content": ", ".join(answers) + "."}


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """`count` strings of `draw`, in the order in which they came up."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _hexadecimal(rng: random.Random) -> str:
    return f"{rng.getrandbits(64):016x}"


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))


@functools.cache
def _words() -> list[str]:
    """Distinct words of the documentation, in alphabetical order."""
    return sorted(set(re.findall(r"\b[a-z]{5,12}\b", read_english())))
