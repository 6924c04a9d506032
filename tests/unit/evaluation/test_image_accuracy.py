"""Questions about images: read, asked, and what counts as right."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.config.images import ImageLimits
from r1ray.config.schema import ImageQuestionsConfig
from r1ray.data.scene_files import write_scenes
from r1ray.errors import ArtifactError, ConfigError
from r1ray.evaluation.image_accuracy import (
    ImageAnswer,
    answer_image_questions,
    read_image_questions,
)
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import tiny_model, write_tiny_model
from tests.unit.models.test_fusion import build_model


@pytest.mark.parametrize(
    ("reply", "is_correct"),
    [
        ("red", True),
        (" Red\n", True),
        ("<think>blue or red?</think>\nred", True),
        ("the red one", False),
        ("", False),
    ],
)
def test_an_answer_is_right_but_for_case_and_spaces(reply: str, is_correct: bool) -> None:
    assert ImageAnswer("query", "what?", "red", reply).is_correct == is_correct


def test_the_first_questions_are_read_with_their_kinds(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes.parquet", 8, first_seed=0)
    config = ImageQuestionsConfig(paths=[str(tmp_path)], num_questions=6)

    found = read_image_questions(config)

    assert [item.kind for item in found] == [
        "exist", "count", "query", "compare", "relation", "exist",
    ]  # fmt: skip
    assert all(len(item.images) == 1 for item in found)


def test_every_question_is_answered_and_a_text_model_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tiny_model(tmp_path / "model"))
    write_scenes(tmp_path / "scenes.parquet", 5, first_seed=0)
    config = ImageQuestionsConfig(paths=[str(tmp_path / "scenes.parquet")])
    questions = read_image_questions(config)

    answers = answer_image_questions(
        build_model("mid"), tokenizer, questions, config, max_new_tokens=3, max_concurrency=2
    )

    assert [item.expected for item in answers] == [item.expected for item in questions]
    with pytest.raises(ConfigError, match="reads text alone"):
        answer_image_questions(
            tiny_model(), tokenizer, questions, config, max_new_tokens=3, max_concurrency=2
        )


def test_an_image_beyond_the_limits_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tiny_model(tmp_path / "model"))
    write_scenes(tmp_path / "scenes.parquet", 1, first_seed=0)
    config = ImageQuestionsConfig(
        paths=[str(tmp_path / "scenes.parquet")], limits=ImageLimits(max_pixels=100)
    )

    with pytest.raises(ArtifactError, match="64 x 64 pixels, the most is 100"):
        answer_image_questions(
            build_model("mid"),
            tokenizer,
            read_image_questions(config),
            config,
            max_new_tokens=3,
            max_concurrency=2,
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"x", "question": None, "answer": "a"}, "no text as its question or answer"),
        ({"image": None, "question": "q", "answer": "a"}, "no bytes of an image"),
    ],
)
def test_a_row_that_is_no_question_is_an_error(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    good = {"image": b"x", "question": "q", "answer": "a"}
    pq.write_table(pa.Table.from_pylist([good, row]), tmp_path / "rows.parquet")

    with pytest.raises(ArtifactError, match=message):
        read_image_questions(ImageQuestionsConfig(paths=[str(tmp_path)]))
