"""What `jobs.bench_fusion` trains on: scenes and questions as tensors, over a vocabulary of words.

Shape legend: N examples, T words of questions and answers, L words of a text, S pixels on a side.
"""

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r1ray.config.images import ImageLimits
from r1ray.data.batch_set import IGNORED
from r1ray.data.scenes import (
    COLORS,
    GRID,
    KINDS,
    MAX_COUNT,
    SHAPES,
    SIZES,
    SceneExample,
    Thing,
    describe_scene,
    draw_question,
    render_scene,
    write_example,
)
from r1ray.errors import ConfigError
from r1ray.models.images import read_image

__all__ = [
    "IMAGE_SIZE",
    "QUESTION_WORDS",
    "TRAINING_WORDS",
    "VOCABULARY",
    "Examples",
    "read_easy_vqa",
    "write_examples",
    "write_texts",
]

IMAGE_SIZE = 48
QUESTION_WORDS = 11  # the longest, its answer included
TRAINING_WORDS = 38  # of four questions, which are mostly shorter
_PAD = "<pad>"
_WORDS = (
    "? is there a the how many are things thing what color shape size more than left right above "
    "below of yes no at"
)
_EASY_WORDS = "does in image contain not present black brown gray teal rectangle"
VOCABULARY = (
    _PAD,
    *dict.fromkeys(
        [
            *_WORDS.split(),
            *COLORS,
            *SHAPES,
            *(f"{shape}s" for shape in SHAPES),
            *SIZES,
            *map(str, range(MAX_COUNT + 1)),
            *(f"r{row}c{column}" for row in range(GRID) for column in range(GRID)),
            *_EASY_WORDS.split(),
        ]
    ),
)
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Examples:
    """Pictures, and questions about each.

    Attributes:
        pixels_N3SS: uint8.
        ids_NT: the words of questions and answers one after the other, padded on the right.
        labels_NT: the answer behind the last word of its question, IGNORED elsewhere.
        kinds: of the first question of each.
        chances: of each first question, how often the best answer is right that it alone allows.
    """

    pixels_N3SS: Tensor
    ids_NT: Tensor
    labels_NT: Tensor
    kinds: tuple[str, ...]
    chances: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def to(self, device: torch.device) -> "Examples":
        """The same on `device`."""
        return replace(
            self,
            pixels_N3SS=self.pixels_N3SS.to(device),
            ids_NT=self.ids_NT.to(device),
            labels_NT=self.labels_NT.to(device),
        )


Pair = tuple[str, str]
"""A question and its answer."""


def write_examples(count: int, first_seed: int, *, questions: int = 1) -> Examples:
    """Scenes, each made for a question of a kind in turn.

    No seed is used by two sets whose ranges are apart.

    Args:
        questions: about each; the answers to the first alone are balanced, and only its answer is
            always a single word.
    """
    images, asked, kinds, chances = [], [], [], []
    for number in range(count):
        example, pairs = _draw_questions(first_seed + number, questions)
        image = render_scene(example.scene, size=IMAGE_SIZE, seed=first_seed + number)
        images.append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
        asked.append(pairs)
        kinds.append(str(example.question.kind))
        chances.append(1 / len(example.question.answers))
    laid_out = _lay_out([([], pairs) for pairs in asked])
    return Examples(torch.stack(images), *laid_out, tuple(kinds), tuple(chances))


def read_easy_vqa() -> tuple[Examples, Examples]:
    """easy-VQA, for training and for the test; its answers are not balanced.

    Raises:
        ConfigError: the package is not installed.
    Source: github.com/vzhou842/easy-VQA; the package easy-vqa 1.0.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ConfigError("the package easy-vqa is not installed; `pip install easy-vqa==1.0`")
    train, test = (
        _read_easy(Path(spec.origin).parent / "data" / part) for part in ("train", "test")
    )
    return train, test


def _read_easy(folder: Path) -> Examples:
    limits, seen = ImageLimits(), {}
    images: list[Tensor] = []
    rows: list[tuple[list[int], list[Pair]]] = []
    for question, answer, number in json.loads((folder / "questions.json").read_text("utf-8")):
        if number not in seen:
            data = (folder / "images" / f"{number}.png").read_bytes()
            seen[number] = torch.from_numpy(read_image(data, IMAGE_SIZE, limits))
        images.append(seen[number])
        rows.append(([], [(question.lower().replace("?", " ?"), answer)]))
    count = len(rows)
    return Examples(torch.stack(images), *_lay_out(rows), ("easy",) * count, (0.0,) * count)


def write_texts(count: int, first_seed: int, *, questions: int) -> tuple[Tensor, Tensor]:
    """Scenes in words, each followed by questions and their answers: (ids, labels), int64 [N, L].

    Args:
        questions: as in `write_examples`.
    """
    rows = []
    for number in range(count):
        example, pairs = _draw_questions(first_seed + number, questions)
        rows.append((_encode(describe_scene(example.scene)), pairs))
    return _lay_out(rows)


def _draw_questions(seed: int, count: int) -> tuple[SceneExample, list[Pair]]:
    """A scene made for a question, and further ones about it, every other what is at a place.

    Such answers say all of a thing at once: what there is to see is learned from them, and what
    the other questions ask for follows from it.
    """
    example, chance = write_example(KINDS[seed % len(KINDS)], seed), random.Random(f"more-{seed}")
    pairs = [(example.question.text, example.answer)]
    while len(pairs) < count:
        if len(pairs) % 2:
            pairs.append(_ask_place(chance.choice(example.scene)))
            continue
        question = draw_question(chance.choice(KINDS), chance)
        answer = question.answer(example.scene)
        if answer is not None:
            pairs.append((question.text, answer))
    return example, pairs


def _ask_place(thing: Thing) -> Pair:
    return (
        f"what is at r{thing.row}c{thing.column} ?",
        f"{thing.size} {thing.color} {thing.shape}",
    )


def _lay_out(rows: Sequence[tuple[list[int], list[Pair]]]) -> tuple[Tensor, Tensor]:
    """(ids, labels) of what comes first, and questions with their answers behind it."""
    all_ids, all_labels = [], []
    for first, pairs in rows:
        ids, labels = [*first], [IGNORED] * len(first)
        for question, answer in pairs:
            words, answered = _encode(question), _encode(answer)
            ids += words + answered
            labels += [IGNORED] * (len(words) - 1) + answered + [IGNORED]
        all_ids.append(ids)
        all_labels.append(labels)
    longest = max(map(len, all_ids))
    return (
        torch.tensor([ids + [0] * (longest - len(ids)) for ids in all_ids]),
        torch.tensor([labels + [IGNORED] * (longest - len(labels)) for labels in all_labels]),
    )


def _encode(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]
