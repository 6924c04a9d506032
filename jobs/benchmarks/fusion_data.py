"""What `jobs.bench_fusion` trains on: scenes and questions as tensors, over a vocabulary of words.

Shape legend: N examples, T words of a question and its answer, L words of a text, S pixels on a
side.
"""

import importlib.util
import json
import random
from dataclasses import dataclass
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
    "VOCABULARY",
    "Examples",
    "read_easy_vqa",
    "write_examples",
    "write_texts",
]

IMAGE_SIZE = 48
QUESTION_WORDS = 13  # the longest, its answer included
_PAD = "<pad>"
_WORDS = (
    "? is there a the how many are things thing what color shape size more than left right above "
    "below of yes no"
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
            *(f"{axis}{number}" for axis in "rc" for number in range(GRID)),
            *_EASY_WORDS.split(),
        ]
    ),
)
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Examples:
    """Questions about pictures.

    Attributes:
        pixels_N3SS: uint8.
        ids_NT: the words of question and answer, padded on the right.
        places_N: of the last word of the question, which the answer follows.
        answers_N: ids of the answers.
        kinds: of the questions.
        chances: of each, what is right as often as the best answer that the question alone allows.
    """

    pixels_N3SS: Tensor
    ids_NT: Tensor
    places_N: Tensor
    answers_N: Tensor
    kinds: tuple[str, ...]
    chances: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def to(self, device: torch.device) -> "Examples":
        """The same on `device`."""
        return Examples(
            self.pixels_N3SS.to(device),
            self.ids_NT.to(device),
            self.places_N.to(device),
            self.answers_N.to(device),
            self.kinds,
            self.chances,
        )


def write_examples(count: int, first_seed: int) -> Examples:
    """As many of each kind of question; no seed is used by two sets whose ranges are apart."""
    images, pairs, kinds, chances = [], [], [], []
    for number in range(count):
        kind, seed = KINDS[number % len(KINDS)], first_seed + number
        example = write_example(kind, seed)
        image = render_scene(example.scene, size=IMAGE_SIZE, seed=seed)
        images.append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
        pairs.append((example.question.text, example.answer))
        kinds.append(str(kind))
        chances.append(1 / len(example.question.answers))
    return _lay_out(images, pairs, kinds, chances)


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
    images, pairs = [], []
    for question, answer, number in json.loads((folder / "questions.json").read_text("utf-8")):
        if number not in seen:
            data = (folder / "images" / f"{number}.png").read_bytes()
            seen[number] = torch.from_numpy(read_image(data, IMAGE_SIZE, limits))
        images.append(seen[number])
        pairs.append((question.lower().replace("?", " ?"), answer))
    return _lay_out(images, pairs, ["easy"] * len(pairs), [0.0] * len(pairs))


def _lay_out(
    images: list[Tensor], pairs: list[tuple[str, str]], kinds: list[str], chances: list[float]
) -> Examples:
    """Of questions and answers in words."""
    rows = [_encode(f"{question} {answer}") for question, answer in pairs]
    return Examples(
        torch.stack(images),
        torch.tensor([row + [0] * (QUESTION_WORDS - len(row)) for row in rows]),
        torch.tensor([len(row) - 2 for row in rows]),
        torch.tensor([row[-1] for row in rows]),
        tuple(kinds),
        tuple(chances),
    )


def write_texts(count: int, first_seed: int, *, questions: int) -> tuple[Tensor, Tensor]:
    """Scenes in words, each followed by questions and their answers: (ids, labels), int64 [N, L].

    Args:
        questions: of each text; the first is balanced as those of pictures.
    """
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for number in range(count):
        chance = random.Random(f"text-{first_seed + number}")
        example = write_example(KINDS[number % len(KINDS)], first_seed + number)
        asked = [(example.question.text, example.answer)]
        while len(asked) < questions:  # not all of a kind: some make sense in few scenes
            question = draw_question(chance.choice(KINDS), chance)
            answer = question.answer(example.scene)
            if answer is not None:
                asked.append((question.text, answer))
        ids = _encode(describe_scene(example.scene))
        marks = [IGNORED] * len(ids)
        for text, answer in asked:
            words = _encode(text)
            ids += [*words, _IDS[answer]]
            marks += [IGNORED] * len(words) + [_IDS[answer]]
        rows.append(ids)
        labels.append([*marks[1:], IGNORED])
    longest = max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]
    marked = [row + [IGNORED] * (longest - len(row)) for row in labels]
    return torch.tensor(padded), torch.tensor(marked)


def _encode(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]
