"""Scenes and questions: right answers, and none that the question gives away."""

import collections

import numpy as np
import pytest

from r1ray.data.scenes import (
    GRID,
    KINDS,
    Kind,
    Scene,
    Thing,
    describe_scene,
    render_scene,
    write_example,
)
from r1ray.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
def test_the_question_alone_is_no_better_than_chance(kind: Kind) -> None:
    """The best answer to each question text, learned on one half, on the other half."""
    examples = [write_example(kind, seed) for seed in range(2000)]
    known, asked = examples[:1000], examples[1000:]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for example in known:
        counts[example.question.text][example.answer] += 1

    right = [
        counts[example.question.text].most_common(1)[0][0] == example.answer
        for example in asked
        if example.question.text in counts
    ]
    chance = np.mean([1 / len(example.question.answers) for example in asked])

    # 1,000 answers: a standard error of 1.6 points.
    assert np.mean(right) < chance + 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_example(kind: Kind) -> None:
    one, same, other = (write_example(kind, seed) for seed in (7, 7, 8))

    assert (one.scene, one.question.text, one.answer) == (
        same.scene,
        same.question.text,
        same.answer,
    )
    assert one.scene != other.scene


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_has_three_to_six_things_in_squares_of_their_own(kind: Kind) -> None:
    for seed in range(50):
        example = write_example(kind, seed)
        places = [(thing.row, thing.column) for thing in example.scene]
        assert 3 <= len(set(places)) == len(places) <= 6
        assert max(max(place) for place in places) < GRID
        assert example.question.answer(example.scene) == example.answer
        assert example.answer in example.question.answers


SCENE: Scene = (
    Thing("small", "red", "circle", 0, 1),
    Thing("large", "blue", "square", 1, 0),
    Thing("small", "red", "square", 2, 3),
)


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("exist", "is there a small red circle ?", "yes"),
        ("exist", "is there a large red circle ?", "no"),
        ("exist", "is there a blue thing ?", "yes"),
        ("exist", "is there a small blue thing ?", "no"),
        ("count", "how many squares are there ?", "2"),
        ("count", "how many yellow things are there ?", "0"),
        ("query", "what color is the large square ?", "blue"),
        ("query", "what shape is the large blue thing ?", "square"),
        ("query", "what size is the red circle ?", "small"),
        ("compare", "are there more red things than blue things ?", "yes"),
        ("compare", "are there more yellow things than green things ?", "no"),
        ("relation", "is the red circle right of the blue square ?", "yes"),
        ("relation", "is the blue square above the red circle ?", "no"),
        ("relation", "is the blue circle above the red circle ?", None),  # there is none
        ("query", "what shape is the small red thing ?", None),  # there are two
    ],
)
def test_questions_are_answered_by_what_is_in_the_scene(
    kind: Kind, text: str, answer: str | None
) -> None:
    found = (write_example(kind, seed).question for seed in range(20_000))
    question = next(question for question in found if question.text == text)

    assert question.answer(SCENE) == answer


def test_a_description_names_every_thing() -> None:
    assert describe_scene(SCENE[:2]) == "small red circle r0c1 large blue square r1c0"


def test_a_picture_shows_things_in_their_squares() -> None:
    pixels = render_scene(SCENE, size=64, seed=3).astype(int)
    cells = pixels.reshape(GRID, 16, GRID, 16, 3)
    redness = (cells[..., 0] - cells[..., 2]).max(axis=(1, 3))
    blueness = (cells[..., 2] - cells[..., 0]).max(axis=(1, 3))

    assert {tuple(place) for place in np.argwhere(redness > 80).tolist()} == {(0, 1), (2, 3)}
    assert np.argwhere(blueness > 80).tolist() == [[1, 0]]
    assert (render_scene(SCENE, size=64, seed=3) == pixels).all()


@pytest.mark.parametrize("size", [30, 63])
def test_a_size_that_cannot_be_drawn_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"a scene of {size} pixels"):
        render_scene(SCENE, size=size)
