"""Exact-match accuracy on questions about images, by kind of question."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from r1ray.config.schema import ImageQuestionsConfig
from r1ray.data.image_rows import list_images
from r1ray.data.sources import list_files
from r1ray.errors import ArtifactError, ConfigError, ImageError
from r1ray.evaluation.accuracy import extract_answer
from r1ray.models.batch_generation import generate_batch
from r1ray.models.decoder import Decoder
from r1ray.models.image_tokens import IMAGE_MARK, encode_marked, image_id
from r1ray.models.images import read_image
from r1ray.models.requests import RequestImage
from r1ray.models.tokenizer import Tokenizer

__all__ = ["ImageAnswer", "ImageQuestion", "answer_image_questions", "read_image_questions"]


@dataclass(frozen=True)
class ImageQuestion:
    """A question about images, and its right answer."""

    images: tuple[bytes, ...]
    question: str
    expected: str
    kind: str


@dataclass(frozen=True)
class ImageAnswer:
    """What a model answered; right where it is the expected answer but for case and spaces."""

    kind: str
    question: str
    expected: str
    reply: str

    @property
    def is_correct(self) -> bool:
        return extract_answer(self.reply).strip().casefold() == self.expected.strip().casefold()


def read_image_questions(config: ImageQuestionsConfig) -> list[ImageQuestion]:
    """The first questions of the files.

    Raises:
        ArtifactError: a file cannot be read, a row is no question, or there are none.
    """
    questions: list[ImageQuestion] = []
    for path in list_files(config.paths, key="evaluate.images.paths"):
        try:
            for row in _read_rows(path, config.num_questions - len(questions)):
                images = list_images(
                    row.get(config.image_column), config.image_column, config.limits
                )
                asked, answer = row.get("question"), row.get("answer")
                if not isinstance(asked, str) or not isinstance(answer, str):
                    raise ArtifactError(f"{path}: a row has no text as its question or answer")
                kind = str(row.get("kind") or "all")
                questions.append(ImageQuestion(tuple(images), asked, answer, kind))
        except (ImageError, OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ArtifactError(f"{path}: cannot be evaluated on ({error})") from error
    if not questions:
        raise ArtifactError(f"evaluate.images.paths {config.paths} have no rows; leave images out")
    return questions


def _read_rows(path: str, most: int) -> Iterator[dict[str, Any]]:
    filesystem, inner = (
        fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
    )
    with filesystem.open_input_file(inner) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                if most <= 0:
                    return
                most -= 1
                yield row


def answer_image_questions(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: list[ImageQuestion],
    config: ImageQuestionsConfig,
    *,
    max_new_tokens: int,
    max_concurrency: int,
) -> list[ImageAnswer]:
    """Greedy replies, in order.

    Raises:
        ConfigError: the model reads text alone.
        ArtifactError: an image cannot be read.
    """
    if model.fusion is None:
        raise ConfigError("evaluate.images: the model reads text alone; set base.fusion")
    fusion = model.fusion.config
    prompts, images = [], []
    for question in questions:
        try:
            pixels = [
                read_image(data, fusion.image_size, config.limits) for data in question.images
            ]
        except ImageError as error:
            raise ArtifactError(f"evaluate.images: {question.question!r:.60}: {error}") from error
        content = IMAGE_MARK * len(pixels) + question.question
        text = tokenizer.render_chat(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        ids, places = encode_marked(
            tokenizer, text, list(map(image_id, pixels)), fusion.num_image_tokens
        )
        prompts.append(ids)
        images.append(list(map(RequestImage, pixels, places)))
    outputs = generate_batch(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset({tokenizer.eos_token_id, *model.config.eos_token_ids}),
        max_concurrency=max_concurrency,
        images=images,
    )
    return [
        ImageAnswer(item.kind, item.question, item.expected, tokenizer.decode(output))
        for item, output in zip(questions, outputs, strict=True)
    ]
