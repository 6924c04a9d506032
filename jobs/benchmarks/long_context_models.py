"""The models whose answers on long contexts are compared: SmolLM2 taught the tasks, and its gates.

What SmolLM2 cannot answer densely says nothing about sparse attention: so it is first taught the
tasks, densely, on examples of other seeds than those it is asked. Then gates are trained on such
examples and on Python's own source code, beside the model that no longer changes.

Both trainings run r1ray's own step in this process, on a GPU where there is one.
"""

import functools
import multiprocessing
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from r1ray.config.training import GatesConfig, TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.data.schemas import Conversation, RowError
from r1ray.data.tokenize import Sample, tokenize_rows
from r1ray.evaluation.long_context import TASKS, build_long_task
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
_LENGTHS = (2700, 3400, 4096, CONTEXT)  # the shortest of all tasks takes 2,100 tokens
_FIRST_SEED = 100_000  # of training examples; those that are asked begin at 0
_BATCH_TOKENS = 32_768


@dataclass(frozen=True)
class TrainingSize:
    """How much is trained.

    Attributes:
        tune_examples, gate_examples: of tasks.
        gate_documents: windows of source code, of CONTEXT tokens.
    """

    tune_examples: int
    gate_examples: int
    gate_documents: int


def tune_on_tasks(base: Path, target: Path, size: TrainingSize) -> list[float]:
    """Teach the model in `base` the tasks; written to `target`. Returns the loss of every step."""
    samples = _build_examples(base, range(_FIRST_SEED, _FIRST_SEED + size.tune_examples))
    batches = list(_batch(samples, every_token=False))
    model = load_model(base, dtype=torch.float32).to(_device())
    config = TrainConfig(
        num_steps=max(2, len(batches) // 2),
        warmup_steps=min(20, len(batches) // 4),
        learning_rate=5e-4,
        precision="bf16" if torch.cuda.is_available() else "auto",
    )
    losses = _train(
        TrainState(model, config, build_exchange(config.exchange), LocalTransport()),
        batches,
        per_step=2,
    )
    _save(model, base, target)
    return losses


def train_gates(tuned: Path, target: Path, size: TrainingSize) -> tuple[list[float], int]:
    """Train gates for the model in `tuned`; both are written to `target`.

    Returns:
        the loss of every step, and how many tokens were read.
    """
    first = _FIRST_SEED + size.tune_examples
    samples = _build_examples(tuned, range(first, first + size.gate_examples))
    samples += _read_documents(tuned, size.gate_documents)
    random.Random(0).shuffle(samples)
    batches = list(_batch(samples, every_token=True))
    model = load_model(tuned, dtype=torch.float32)
    model.requires_grad_(False)
    attach_gates(model)
    model = model.to(_device())
    config = TrainConfig(
        num_steps=len(batches),
        warmup_steps=min(5, len(batches) - 1),
        learning_rate=2e-3,
        precision="fp32",
        gates=GatesConfig(),
    )
    objective = GateTraining(GatesConfig())
    state = TrainState(model, config, build_exchange(config.exchange), LocalTransport(), objective)
    losses = _train(state, batches, per_step=1)
    _save(model, tuned, target)
    return losses, sum(batch.num_tokens for batch in batches)


def count_prompt_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of `text` as the only turn of a chat, the header of the answer included."""
    return len(tokenizer.encode(render_prompt(tokenizer, text)))


def render_prompt(tokenizer: Tokenizer, text: str) -> str:
    """The only turn of a chat, and the header of the answer."""
    return tokenizer.render_chat([{"role": "user", "content": text}], add_generation_prompt=True)


def _build_examples(model_dir: Path, seeds: Sequence[int]) -> list[Sample]:
    """Tasks of every kind in turn and of mixed lengths, with all their questions as turns."""
    build = functools.partial(_build_example, str(model_dir))
    with multiprocessing.get_context("spawn").Pool() as pool:
        found = pool.map(build, seeds, chunksize=8)
    return [sample for sample in found if sample is not None]


def _build_example(model_dir: str, seed: int) -> Sample | None:
    tokenizer = _tokenizer(model_dir)
    rng = random.Random(seed)
    name, longest = list(TASKS)[seed % len(TASKS)], rng.choice(_LENGTHS)
    count = functools.partial(count_prompt_tokens, tokenizer)
    most = int(longest * rng.uniform(0.82, 0.86))  # room for further questions
    task = build_long_task(name, count, most, seed=seed)
    conversation = Conversation(task.to_conversation())
    [row] = tokenize_rows(tokenizer, [conversation], max_tokens=CONTEXT, overflow="truncate")
    return None if isinstance(row, RowError) else row.samples[0]


@functools.cache
def _tokenizer(model_dir: str) -> Tokenizer:
    torch.set_num_threads(1)  # one process of many
    return Tokenizer(model_dir)


def _read_documents(model_dir: Path, count: int) -> list[Sample]:
    """Windows of the standard library's source code, drawn at random."""
    tokenizer, rng = Tokenizer(model_dir), random.Random(1)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    samples = []
    for _ in range(count):
        start = rng.randrange(max(1, len(text) - 5 * CONTEXT))
        ids = np.array(tokenizer.encode(text[start : start + 5 * CONTEXT])[:CONTEXT], np.int32)
        samples.append(Sample(ids, np.ones(len(ids), dtype=np.bool_)))
    return samples


def _batch(samples: Sequence[Sample], *, every_token: bool) -> Iterator[MicroBatch]:
    """Batches of similar lengths, in random order.

    Args:
        every_token: is a target, and not the answers alone.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda item: len(item.input_ids)):
        longest = len(sample.input_ids)
        if not groups or longest * (len(groups[-1]) + 1) > _BATCH_TOKENS:
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


def _train(state: TrainState, batches: Sequence[MicroBatch], *, per_step: int) -> list[float]:
    losses = []
    for step in range(state.config.num_steps):
        taken = [batches[(step * per_step + at) % len(batches)] for at in range(per_step)]
        record = state.run_step(taken)
        losses.append(float("nan") if record.loss is None else record.loss)
        if step % 20 == 0:
            print(f"  step {step}/{state.config.num_steps}: {record.describe()}", flush=True)
    return losses


def _save(model: Decoder, source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    save_model(model.cpu().eval(), partial)
    copy_tokenizer(source, partial)
    partial.rename(target)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
