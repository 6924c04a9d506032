"""Rows with images: from Parquet to samples with places, and what goes to quarantine."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from r1ray.config.images import ImageLimits
from r1ray.config.prepare import ImageSourceConfig
from r1ray.data import image_rows
from r1ray.data.image_rows import read_image_file
from r1ray.data.scene_files import write_scenes
from r1ray.data.schemas import Conversation, RowError
from r1ray.data.tokenize import TokenizedRow, tokenize_rows
from r1ray.errors import ArtifactError
from r1ray.models.image_tokens import IMAGE_MARK
from r1ray.models.images import read_png
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model

LIMITS = ImageLimits(max_pixels=4096, max_images=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("model")))


def png(size: int = 20, color: tuple[int, int, int] = (250, 0, 0)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG")
    return stream.getvalue()


def read(path: Path, **changes: Any) -> list[dict[str, Any]]:
    source = ImageSourceConfig(type="images", paths=[str(path)], limits=LIMITS, **changes)
    return [row for table in read_image_file(str(path), source, 16) for row in table.to_pylist()]


@pytest.mark.parametrize(
    "image", [png(), {"bytes": png(), "path": None}, [png(), png()], [{"bytes": png()}]]
)
def test_images_are_bytes_structs_or_lists(tmp_path: Path, image: Any) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"image": image, "question": "what?", "answer": "red"}]
    pq.write_table(pa.Table.from_pylist(rows), path)

    [row] = read(path)

    assert row["error"] is None
    assert len(row["images"]) == (len(image) if isinstance(image, list) else 1)
    for data in row["images"]:
        pixels = read_png(data)
        assert pixels.shape == (3, 16, 16)
        assert (pixels[0] == 250).all()


def test_bad_images_and_bad_texts_are_quarantined_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [
        {"image": png(), "question": "what?", "answer": "red"},
        {"image": b"no image", "question": "what?", "answer": "red"},
        {"image": png(65), "question": "what?", "answer": "red"},
        {"image": None, "question": "what?", "answer": "red"},
        {"image": png(), "question": None, "answer": "red"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)

    found = read(path)

    assert [row["row"] for row in found] == [0, 1, 2, 3, 4]
    assert found[0]["error"] is None
    reasons = ["cannot be read", "65 x 65 pixels", "no bytes of an image", "neither `messages`"]
    for row, reason in zip(found[1:], reasons, strict=True):
        assert reason in row["error"]
        assert row["images"] is None


def test_a_text_that_is_not_utf8_costs_its_own_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    questions = pa.array([b"what?", b"\xff\xfe", b"where?"], pa.binary()).view(pa.string())
    columns = {"image": [png()] * 3, "question": questions, "answer": ["red"] * 3}
    pq.write_table(pa.table(columns), path)

    found = read(path)

    assert [row["error"] is None for row in found] == [True, False, True]
    assert "not UTF-8" in found[1]["error"]


def test_images_do_not_count_as_the_text_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_rows, "MAX_ROW_BYTES", 50)
    path = tmp_path / "rows.parquet"
    questions = ["what?", "what" * 20 + "?"]
    rows = [{"image": png(), "question": question, "answer": "red"} for question in questions]
    pq.write_table(pa.Table.from_pylist(rows), path)

    short, long = read(path)

    assert short["error"] is None
    assert long["error"] == "row is longer than 50 bytes"


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")

    with pytest.raises(ArtifactError, match="cannot be read"):
        read(path)


def test_scenes_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "scenes.parquet"
    write_scenes(path, 7, first_seed=5)

    found = read(path)

    assert [row["error"] for row in found] == [None] * 7
    kinds = pq.read_table(path)["kind"].to_pylist()
    assert kinds == ["exist", "count", "query", "compare", "relation", "exist", "count"]


def tokenize(tokenizer: Tokenizer, turns: list[dict[str, Any]], num_images: int = 1) -> Any:
    conversation = Conversation(turns, num_images=num_images)
    text = Conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    [first, row, last] = tokenize_rows(
        tokenizer,
        [text, conversation, text],
        max_tokens=64,
        overflow="truncate",
        num_image_tokens=4,
    )
    assert isinstance(first, TokenizedRow)
    assert isinstance(last, TokenizedRow)
    assert (first.samples[0].input_ids == last.samples[0].input_ids).all(), "texts are untouched"
    return row


def turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "look"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def test_images_take_their_positions_before_the_question(tokenizer: Tokenizer) -> None:
    row = tokenize(tokenizer, turns("what is it?", "a red thing"), num_images=2)

    [sample] = row.samples
    before = tokenizer.encode("<|im_start|>system\nlook<|im_end|>\n<|im_start|>user\n")
    after = tokenizer.encode("what is it?<|im_end|>\n<|im_start|>assistant\na red thing<|im_end|>")
    assert sample.input_ids.tolist() == [*before, *[-1] * 8, *after]
    answer = np.array(sample.input_ids)[sample.is_target].tolist()
    assert answer == tokenizer.encode("a red thing<|im_end|>")


def test_a_row_with_images_is_never_cut(tokenizer: Tokenizer) -> None:
    row = tokenize(tokenizer, turns("what is it? " * 20, "a red thing"))

    assert isinstance(row, RowError)
    assert "max_tokens is 64" in str(row)


def test_a_text_with_the_mark_is_refused_where_there_are_images(tokenizer: Tokenizer) -> None:
    row = tokenize(tokenizer, turns(f"what is {IMAGE_MARK}?", "red"))
    same = tokenize(tokenizer, turns(f"what is {IMAGE_MARK}?", "red"), num_images=0)

    assert isinstance(row, RowError)
    assert "U+FFFC" in str(row)
    assert (same.samples[0].input_ids >= 0).all()


def test_images_need_a_user_turn(tokenizer: Tokenizer) -> None:
    row = tokenize(tokenizer, [{"role": "assistant", "content": "red"}])

    assert isinstance(row, RowError)
    assert "no user turn" in str(row)
