"""Pictures of a few shapes and questions about them, in the manner of CLEVR, written by program.

1. A question is drawn first, then its answer, each possible one with the same chance, and last a
   scene in which that is the answer. Whoever sees questions alone is therefore at chance, whatever
   the question.
2. A scene has 3 to 6 things, each in a square of its own of a grid of 4 by 4, off its middle by
   some pixels; colours and background are not quite even.

Price: about 0.2 ms a scene that is tried, of which few to some dozens are; 0.3 ms a picture.
Source: Johnson et al. 2017 (CLEVR), arXiv:1612.06890; balance as in Goyal et al. 2017 (VQA v2),
arXiv:1612.00837.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from r1ray.errors import ConfigError

__all__ = [
    "COLORS",
    "KINDS",
    "MAX_COUNT",
    "SHAPES",
    "SIZES",
    "Kind",
    "Question",
    "Scene",
    "SceneExample",
    "Thing",
    "describe_scene",
    "draw_question",
    "draw_scene",
    "render_scene",
    "write_example",
]

Kind = Literal["exist", "count", "query", "compare", "relation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
COLORS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (40, 90, 214),
    "yellow": (235, 200, 40),
}
GRID = 4
_FEATURES = ("size", "color", "shape")
MAX_COUNT = 3
_FEWEST, _MOST = 3, 6
_YES_NO = ("yes", "no")
_MAX_TRIES = 100_000


@dataclass(frozen=True)
class Thing:
    """One thing of a scene; row 0 is at the top, column 0 at the left."""

    size: str
    color: str
    shape: str
    row: int
    column: int


Scene = tuple[Thing, ...]
"""Its things, row by row."""


@dataclass(frozen=True)
class Question:
    """A question and how a scene answers it.

    Attributes:
        answers: those that are possible.
        answer: the one of a scene; None where the question makes no sense there.
    """

    kind: Kind
    text: str
    answers: tuple[str, ...]
    answer: Callable[[Scene], str | None]


@dataclass(frozen=True)
class SceneExample:
    """A question about a scene, and its answer there."""

    scene: Scene
    question: Question
    answer: str


def write_example(kind: Kind, seed: int) -> SceneExample:
    """An example of this kind; the same `seed` gives the same one."""
    chance = random.Random(f"{kind}-{seed}")
    question = draw_question(kind, chance)
    wanted = chance.choice(question.answers)
    for _ in range(_MAX_TRIES):
        scene = draw_scene(chance)
        if question.answer(scene) == wanted:
            return SceneExample(scene, question, wanted)
    raise AssertionError(f"no scene answers {question.text!r} with {wanted!r}")


def draw_scene(chance: random.Random) -> Scene:
    """Things of random kinds in different squares."""
    places = sorted(chance.sample(range(GRID * GRID), chance.randint(_FEWEST, _MOST)))
    colors = tuple(COLORS)
    return tuple(
        Thing(
            chance.choice(SIZES), chance.choice(colors), chance.choice(SHAPES), *divmod(place, GRID)
        )
        for place in places
    )


def draw_question(kind: Kind, chance: random.Random) -> Question:
    """A question of this kind."""
    return _WRITERS[kind](chance)


def describe_scene(scene: Scene) -> str:
    """The scene in words, from which every question can be answered: r0c1 is row 0, column 1."""
    return " ".join(
        f"{thing.size} {thing.color} {thing.shape} r{thing.row}c{thing.column}" for thing in scene
    )


def render_scene(scene: Scene, *, size: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """A picture, uint8 [size, size, 3].

    Args:
        size: pixels on a side, a multiple of 4 of at least 32.
        seed: of where in their squares things are, and of the noise.
    Raises:
        ConfigError: a size that the grid does not divide, or at which shapes cannot be told.
    """
    if size % GRID or size < 8 * GRID:
        raise ConfigError(
            f"a scene of {size} pixels on a side cannot be drawn; take a multiple of {GRID} of at "
            f"least {8 * GRID}"
        )
    chance, cell = np.random.default_rng(seed), size // GRID
    image = chance.normal(128.0, 4.0, (size, size, 3))
    rows, columns = np.mgrid[0:cell, 0:cell] + 0.5
    for thing in scene:
        radius = cell * (0.4 if thing.size == "large" else 0.24)
        middle = cell / 2 + chance.uniform(-1, 1, 2) * (cell / 2 - radius) * 0.5
        mask = _mask(thing.shape, rows - middle[0], columns - middle[1], radius)
        part = image[
            thing.row * cell : (thing.row + 1) * cell,
            thing.column * cell : (thing.column + 1) * cell,
        ]
        part[mask] += np.array(COLORS[thing.color]) - 128.0 + chance.normal(0.0, 6.0, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def _mask(
    shape: str, y: NDArray[np.float64], x: NDArray[np.float64], radius: float
) -> NDArray[np.bool_]:
    """Where a shape around the origin is."""
    if shape == "circle":
        return np.asarray(y**2 + x**2 <= radius**2)
    if shape == "square":
        side = 0.85 * radius
        return np.asarray((np.abs(y) <= side) & (np.abs(x) <= side))
    return np.asarray((np.abs(y) <= radius) & (np.abs(x) <= (y + radius) / 2))


def _exist(chance: random.Random) -> Question:
    look = dict(zip(_FEATURES, _draw_look(chance), strict=True))
    named = [name for name in _FEATURES if chance.random() < 0.5] or [chance.choice(_FEATURES)]
    what = " ".join([look[name] for name in named] + ["thing"] * ("shape" not in named))
    return Question(
        "exist",
        f"is there a {what} ?",
        _YES_NO,
        lambda scene: _yes_no(bool(_find(scene, **{name: look[name] for name in named}))),
    )


def _count(chance: random.Random) -> Question:
    name, value = _draw_feature(chance)
    what = f"{value}s" if name == "shape" else f"{value} things"

    def answer(scene: Scene) -> str | None:
        count = len(_find(scene, **{name: value}))
        return str(count) if count <= MAX_COUNT else None

    answers = tuple(str(count) for count in range(MAX_COUNT + 1))
    return Question("count", f"how many {what} are there ?", answers, answer)


def _query(chance: random.Random) -> Question:
    size, color, shape = _draw_look(chance)
    asked = chance.choice(("size", "color", "shape"))
    named = {"size": size, "color": color, "shape": shape}
    answers = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES}[asked]
    del named[asked]
    what = " ".join([*named.values()] if asked != "shape" else [*named.values(), "thing"])

    def answer(scene: Scene) -> str | None:
        found = _find(scene, **named)
        return getattr(found[0], asked) if len(found) == 1 else None

    return Question("query", f"what {asked} is the {what} ?", answers, answer)


def _compare(chance: random.Random) -> Question:
    more, fewer = chance.sample(tuple(COLORS), 2)
    return Question(
        "compare",
        f"are there more {more} things than {fewer} things ?",
        _YES_NO,
        lambda scene: _yes_no(len(_find(scene, color=more)) > len(_find(scene, color=fewer))),
    )


def _relation(chance: random.Random) -> Question:
    (_, color, shape), (_, other_color, other_shape) = _draw_look(chance), _draw_look(chance)
    while (color, shape) == (other_color, other_shape):
        _, other_color, other_shape = _draw_look(chance)
    where = chance.choice(("left of", "right of", "above", "below"))
    axis = "column" if where.endswith("of") else "row"

    def answer(scene: Scene) -> str | None:
        one = _find(scene, color=color, shape=shape)
        other = _find(scene, color=other_color, shape=other_shape)
        if len(one) != 1 or len(other) != 1:
            return None
        first, second = getattr(one[0], axis), getattr(other[0], axis)
        if first == second:
            return None
        return _yes_no((first < second) == (where in ("left of", "above")))

    text = f"is the {color} {shape} {where} the {other_color} {other_shape} ?"
    return Question("relation", text, _YES_NO, answer)


_WRITERS: dict[Kind, Callable[[random.Random], Question]] = {
    "exist": _exist,
    "count": _count,
    "query": _query,
    "compare": _compare,
    "relation": _relation,
}


def _draw_look(chance: random.Random) -> tuple[str, str, str]:
    return chance.choice(SIZES), chance.choice(tuple(COLORS)), chance.choice(SHAPES)


def _draw_feature(chance: random.Random) -> tuple[str, str]:
    name = chance.choice(("color", "shape"))
    return name, chance.choice(tuple(COLORS) if name == "color" else SHAPES)


def _find(scene: Sequence[Thing], **features: str) -> list[Thing]:
    return [
        thing
        for thing in scene
        if all(getattr(thing, name) == value for name, value in features.items())
    ]


def _yes_no(is_so: bool) -> str:
    return _YES_NO[0] if is_so else _YES_NO[1]
