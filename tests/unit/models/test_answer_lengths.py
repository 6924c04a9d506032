"""Predicted answer lengths against what was seen."""

from pathlib import Path

import pytest

from r1ray.errors import ArtifactError
from r1ray.models.answer_lengths import (
    ANSWER_LENGTHS_FILE,
    AnswerLengths,
    read_answer_lengths,
    write_answer_lengths,
)


def test_without_a_sample_everything_is_reserved() -> None:
    assert AnswerLengths().predict(0, 500) == 500


def test_the_prediction_is_the_mean_of_what_is_longer() -> None:
    lengths = AnswerLengths({10: 300, 50: 200, 400: 100})
    assert lengths.predict(0, 1000) == pytest.approx((10 * 3 + 50 * 2 + 400) / 6, abs=2)
    assert lengths.predict(10, 1000) == pytest.approx((50 * 2 + 400) / 3, abs=2)
    assert lengths.predict(50, 1000) == 400
    assert lengths.predict(10, 100) == pytest.approx((50 * 2 + 100) / 3, abs=2)
    assert lengths.predict(400, 1000) == 1000  # none was as long


def test_the_prediction_follows_what_is_asked() -> None:
    lengths = AnswerLengths({10: 1})
    for _ in range(256):
        lengths.observe(200, was_cut=False)
    assert lengths.predict(0, 1000) == 200


def test_an_answer_that_was_cut_counts_as_what_it_would_have_become() -> None:
    lengths = AnswerLengths({100: 1})
    for _ in range(256):
        lengths.observe(16, was_cut=True)
    assert lengths.predict(0, 1000) == 100
    lengths.observe(300, was_cut=True)
    assert lengths.predict(200, 1000) == 300


def test_counts_are_kept_in_the_model_directory(tmp_path: Path) -> None:
    assert read_answer_lengths(tmp_path) == {}
    write_answer_lengths(tmp_path, {"5": 2, "70": 1})
    assert read_answer_lengths(tmp_path) == {5: 2, 70: 1}


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"0": 1}', '{"5": -1}', '{"5": null}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / ANSWER_LENGTHS_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="export the model anew"):
        read_answer_lengths(tmp_path)
