"""The models whose answers on long contexts are compared: SmolLM2 taught the tasks, and its gates.

What SmolLM2 cannot answer densely says nothing about sparse attention: so it is first taught the
tasks, densely, on examples of other seeds than those it is asked. Then gates are trained on such
examples and on Python's own source code, beside the model that no longer changes.

Both trainings run r1ray's own step in this process, on a GPU where there is one.
"""

import functools
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from r1ray.config.training import GatesConfig, TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.data.long_context import write_conversation
from r1ray.data.schemas import Conversation, RowError
from r1ray.data.tokenize import Sample, tokenize_rows
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import Decoder, load_model, save_model
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.models.gates import attach_gates
from r1ray.models.tokenizer import Tokenizer
from r1ray.training.gates import GateTraining
from r1ray.training.step import TrainState

__all__ = [
    "CONTEXT",
    "TrainingSize",
    "count_prompt_tokens",
    "render_prompt",
    "train_gates",
    "tune_on_tasks",
]

CONTEXT = 8192
Step = dict[str, float | None]  # of a training: tokens so far, loss, recall
_FIRST_NUMBER = 1_000_000  # of training samples; the tasks that are asked begin at 0
_TUNE_BATCH, _GATE_BATCH = 32_768, 16_384  # tokens
_GPU_CHUNK = 2048  # of queries


@dataclass(frozen=True)
class TrainingSize:
    """How much is trained.

    Attributes:
        tune_examples, gate_examples: of tasks.
        gate_documents: windows of source code.
    """

    tune_examples: int
    gate_examples: int
    gate_documents: int


def tune_on_tasks(base: Path, target: Path, size: TrainingSize) -> list[Step]:
    """Teach the model in `base` the tasks; written to `target`."""
    numbers = range(_FIRST_NUMBER, _FIRST_NUMBER + size.tune_examples)
    samples = _write_samples(base, numbers, is_task=True)
    batches = list(_batch(samples, _TUNE_BATCH, every_token=False))
    model = load_model(base, dtype=torch.float32).to(_device())
    config = TrainConfig(
        num_steps=max(2, len(batches) // 2),
        warmup_steps=min(20, len(batches) // 4),
        learning_rate=5e-4,
        precision="bf16" if torch.cuda.is_available() else "auto",
    )
    steps = _train(
        TrainState(model, config, build_exchange(config.exchange), LocalTransport()),
        batches,
        per_step=2,
    )
    _save(model.to(torch.bfloat16), base, target)  # as SmolLM2 is published
    return steps


def train_gates(tuned: Path, target: Path, size: TrainingSize) -> list[Step]:
    """Train gates for the model in `tuned`; both are written to `target`."""
    first = _FIRST_NUMBER + size.tune_examples
    numbers = range(first, first + size.gate_examples)
    samples = _write_samples(tuned, numbers, is_task=True)
    samples += _write_samples(tuned, range(size.gate_documents), is_task=False)
    random.Random(0).shuffle(samples)
    batches = list(_batch(samples, _GATE_BATCH, every_token=True))
    model = load_model(tuned, dtype=torch.float32)
    model.requires_grad_(False)
    attach_gates(model)
    model = model.to(_device())
    gates = GatesConfig(query_chunk=_GPU_CHUNK) if torch.cuda.is_available() else GatesConfig()
    config = TrainConfig(
        num_steps=len(batches),
        warmup_steps=min(5, len(batches) - 1),
        learning_rate=2e-3,
        precision="fp32",
        gates=gates,
    )
    objective = GateTraining(gates)
    state = TrainState(model, config, build_exchange(config.exchange), LocalTransport(), objective)
    steps = _train(state, batches, per_step=1)
    _save(model, tuned, target)
    return steps


def count_prompt_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of `text` as the only turn of a chat, the header of the answer included."""
    return len(tokenizer.encode(render_prompt(tokenizer, text)))


def render_prompt(tokenizer: Tokenizer, text: str) -> str:
    """The only turn of a chat, and the header of the answer."""
    return tokenizer.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)


def _write_samples(model_dir: Path, numbers: Sequence[int], *, is_task: bool) -> list[Sample]:
    write = functools.partial(_write_sample, str(model_dir), is_task)
    with multiprocessing.get_context("spawn").Pool() as pool:
        return pool.map(write, numbers, chunksize=8)


def _write_sample(model_dir: str, is_task: bool, number: int) -> Sample:
    tokenizer = _tokenizer(model_dir)
    messages = write_conversation(tokenizer, number, max_tokens=CONTEXT, is_task=is_task)
    conversation = Conversation(messages)
    [row] = tokenize_rows(tokenizer, [conversation], max_tokens=CONTEXT, overflow="truncate")
    if isinstance(row, RowError):
        raise row
    return row.samples[0]


@functools.cache
def _tokenizer(model_dir: str) -> Tokenizer:
    torch.set_num_threads(1)  # one process of many
    return Tokenizer(model_dir)


def _batch(samples: Sequence[Sample], most: int, *, every_token: bool) -> Iterator[MicroBatch]:
    """Batches of similar lengths, in random order.

    Args:
        most: tokens of a batch, padding included.
        every_token: is a target, and not the answers alone.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda item: len(item.input_ids)):
        longest = len(sample.input_ids)
        if not groups or longest * (len(groups[-1]) + 1) > most:
            groups.append([])
        groups[-1].append(sample)
    random.Random(2).shuffle(groups)
    for group in groups:
        longest = max(len(item.input_ids) for item in group)
        ids_BT = torch.zeros(len(group), longest, dtype=torch.long)
        labels_BT = torch.full_like(ids_BT, IGNORED)
        for row, item in enumerate(group):
            ids, is_target = torch.tensor(item.input_ids).long(), torch.tensor(item.is_target)
            ids_BT[row, : len(ids)] = ids
            counted = torch.ones_like(is_target) if every_token else is_target
            labels_BT[row, : len(ids) - 1] = torch.where(counted[1:], ids[1:], IGNORED)
        num_tokens = sum(len(item.input_ids) for item in group)
        yield MicroBatch(ids_BT, labels_BT, num_tokens, int((labels_BT != IGNORED).sum()))


def _train(state: TrainState, batches: Sequence[MicroBatch], *, per_step: int) -> list[Step]:
    steps: list[Step] = []
    tokens = 0
    for step in range(state.config.num_steps):
        taken = [batches[(step * per_step + at) % len(batches)] for at in range(per_step)]
        record = state.run_step(taken)
        tokens += record.num_tokens
        steps.append({"tokens": tokens, "loss": record.loss, "recall": record.recall})
        if step % 20 == 0:
            print(f"  step {step}/{state.config.num_steps}: {record.describe()}", flush=True)
    return steps


def _save(model: Decoder, source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    save_model(model.cpu().eval(), partial)
    copy_tokenizer(source, partial)
    partial.rename(target)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
