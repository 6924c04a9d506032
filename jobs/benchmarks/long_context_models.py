"""The models whose answers on long contexts are compared: SmolLM2 taught the tasks, and its gates.

What SmolLM2 cannot answer densely says nothing about sparse attention: so it is first taught the
tasks, densely, on examples of other seeds than those it is asked. Then the gates of the published
model are trained further on such examples and on Python's own source code, beside the model that no
longer changes.

Both trainings are `jobs.benchmarks.local_training`'s.
"""

import functools
import multiprocessing
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.benchmarks.local_training import (
    Step,
    batch_by_length,
    pick_device,
    save_trained,
    train_steps,
)
from r1ray.config.training import GatesConfig, TrainConfig
from r1ray.data.long_context import write_conversation
from r1ray.data.schemas import Conversation, RowError
from r1ray.data.tokenize import Sample, tokenize_rows
from r1ray.models import load_model
from r1ray.models.gates import load_gates
from r1ray.models.tokenizer import Tokenizer
from r1ray.training.gates import GateTraining

__all__ = [
    "CONTEXT",
    "Lesson",
    "TaskSize",
    "count_prompt_tokens",
    "learn_tasks",
    "render_prompt",
    "train_gates",
]

CONTEXT = 8192
_CHUNK = 8  # samples that a process writes at once
_FIRST_NUMBER = 1_000_000  # of training samples; the tasks that are asked have smaller ones


@dataclass(frozen=True)
class Lesson:
    """Examples of tasks that the model learns, densely.

    Attributes:
        tasks: of each in turn.
        num_texts: each with its questions.
        max_tokens: of a text with its questions and answers.
        batch_tokens: of a micro-batch, padding included.
        batches_per_step: micro-batches.
        learning_rate: the peak.
    """

    tasks: tuple[str, ...]
    num_texts: int
    max_tokens: int
    batch_tokens: int
    batches_per_step: int
    learning_rate: float


@dataclass(frozen=True)
class TaskSize:
    """How much is trained and asked.

    Attributes:
        lessons: one after the other.
        num_gate_texts: of the tasks of the last lesson.
        num_gate_documents: windows of source code.
        num_questions: that are asked, at least, of each task that is taught and each length.
        max_questions_per_text: that are asked, of those that a text has.
    """

    lessons: tuple[Lesson, ...]
    num_gate_texts: int
    num_gate_documents: int
    num_questions: int
    max_questions_per_text: int


def learn_tasks(base: Path, target: Path, lesson: Lesson, first: int) -> list[Step]:
    """Teach the model in `base` a lesson; written to `target`.

    Args:
        first: number of its first text.
    """
    numbers = range(_FIRST_NUMBER + first, _FIRST_NUMBER + first + lesson.num_texts)
    samples = _write_samples(base, numbers, lesson.max_tokens, lesson.tasks)
    batches = list(batch_by_length(samples, lesson.batch_tokens))
    model = load_model(base, dtype=torch.float32).to(pick_device())
    num_steps = max(2, len(batches) // lesson.batches_per_step)
    config = TrainConfig(
        num_steps=num_steps,
        batches_per_step=lesson.batches_per_step,
        warmup_steps=min(20, num_steps // 5),
        learning_rate=lesson.learning_rate,
        precision="bf16" if torch.cuda.is_available() else "auto",
    )
    steps = train_steps(model, config, batches)
    save_trained(model.to(torch.bfloat16), base, target)  # as SmolLM2 is published
    return steps


def train_gates(tuned: Path, gates: Path, target: Path, size: TaskSize) -> list[Step]:
    """Train the gates in `gates` further, for the model in `tuned`; both go to `target`."""
    first = _FIRST_NUMBER + sum(lesson.num_texts for lesson in size.lessons)
    numbers = range(first, first + size.num_gate_texts)
    samples = _write_samples(tuned, numbers, CONTEXT, size.lessons[-1].tasks)
    samples += _write_samples(tuned, range(size.num_gate_documents), CONTEXT, ())
    random.Random(0).shuffle(samples)
    batches = list(batch_by_length(samples, CONTEXT))
    model = load_model(tuned, dtype=torch.float32)
    model.requires_grad_(False)
    load_gates(model, gates)
    model = model.to(pick_device())
    settings = GatesConfig()
    config = TrainConfig(
        num_steps=len(batches),
        batches_per_step=1,
        warmup_steps=min(5, len(batches) - 1),
        learning_rate=2e-3,
        precision="fp32",
        gates=settings,
    )
    steps = train_steps(model, config, batches, GateTraining(settings, seed=0))
    save_trained(model, tuned, target)
    return steps


def count_prompt_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of `text` as the only turn of a chat, the header of the answer included."""
    return len(tokenizer.encode(render_prompt(tokenizer, text)))


def render_prompt(tokenizer: Tokenizer, text: str) -> str:
    """The only turn of a chat, and the header of the answer."""
    return tokenizer.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)


def _write_samples(
    model_dir: Path, numbers: Sequence[int], most: int, tasks: tuple[str, ...]
) -> list[Sample]:
    """Of `tasks` in turn; windows of source code where there are none."""
    write = functools.partial(_write_sample, str(model_dir), most, tasks)
    if len(numbers) <= _CHUNK:
        return list(map(write, numbers))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.map(write, numbers, chunksize=_CHUNK)


def _write_sample(model_dir: str, most: int, tasks: tuple[str, ...], number: int) -> Sample:
    tokenizer = _tokenizer(model_dir)
    messages = write_conversation(tokenizer, number, max_tokens=most, tasks=tasks)
    conversation = Conversation(messages)
    [row] = tokenize_rows(tokenizer, [conversation], max_tokens=most, overflow="truncate")
    if isinstance(row, RowError):
        raise row
    return row.samples[0]


@functools.cache
def _tokenizer(model_dir: str) -> Tokenizer:
    return Tokenizer(model_dir)
