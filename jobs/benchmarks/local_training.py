"""r1ray's own training step in this process, without Ray: on a GPU where there is one.

On a GPU, products of float32 matrices are rounded to TF32 (10 bits of mantissa), in training and in
what is measured there.
"""

import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from r1ray.config.training import TrainConfig
from r1ray.data.batch_set import IGNORED, MicroBatch
from r1ray.data.tokenize import Sample
from r1ray.exchange import LocalTransport, build_exchange
from r1ray.models import Decoder, save_model
from r1ray.models.checkpoint import copy_tokenizer
from r1ray.training.objective import Objective
from r1ray.training.step import TrainState

__all__ = ["Step", "batch_by_length", "pick_device", "save_trained", "train_steps"]

Step = dict[str, float | None]  # of a training: tokens so far, loss, recall
_SHOWN_STEPS = 20


def pick_device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def batch_by_length(samples: Iterable[Sample], most: int) -> Iterator[MicroBatch]:
    """Batches of similar lengths, in random order; up to `most` tokens each, padding included."""
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
            labels_BT[row, : len(ids) - 1] = torch.where(is_target[1:], ids[1:], IGNORED)
        num_tokens = sum(len(item.input_ids) for item in group)
        yield MicroBatch(ids_BT, labels_BT, num_tokens, int((labels_BT != IGNORED).sum()))


def train_steps(
    model: Decoder,
    config: TrainConfig,
    batches: Sequence[MicroBatch],
    objective: Objective | None = None,
) -> list[Step]:
    """Train `model` for `config.num_steps`, over `batches` in turn; what every step did."""
    exchange = build_exchange(config.exchange)
    state = TrainState(model, config, exchange, LocalTransport(), objective)
    steps: list[Step] = []
    tokens = 0
    for step in range(config.num_steps):
        first = step * config.batches_per_step
        taken = (batches[(first + at) % len(batches)] for at in range(config.batches_per_step))
        record = state.run_step(taken)
        tokens += record.num_tokens
        steps.append({"tokens": tokens, "loss": record.loss, "recall": record.recall})
        if step % _SHOWN_STEPS == 0:
            print(f"  step {step}/{config.num_steps}: {record.describe()}", flush=True)
    return steps


def save_trained(model: Decoder, tokenizer_dir: Path, target: Path) -> None:
    """Write `model`, with the tokenizer in `tokenizer_dir`, as the model directory `target`."""
    partial = target.with_name(target.name + ".partial")
    save_model(model.cpu().eval(), partial)
    copy_tokenizer(tokenizer_dir, partial)
    shutil.rmtree(target, ignore_errors=True)  # of a start that ended before it was judged
    partial.rename(target)
