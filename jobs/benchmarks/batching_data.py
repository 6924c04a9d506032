"""The three sets of lengths that batching is measured on, and micro-batches of given shapes."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.benchmarks.batching_arms import Shape
from r1ray.data.batch_set import IGNORED, MicroBatch

__all__ = [
    "ROWS_PER_BATCH",
    "SCALED_BY",
    "SETS",
    "STEP_TOKENS",
    "build_micro_batch",
    "load_lengths",
]

SETS = ("r1_like", "chat_like", "demo_traces")
ROWS_PER_BATCH = 8  # of the longest length: what fits the memory that all arms are given
SCALED_BY = {"r1_like": 8, "chat_like": 8, "demo_traces": 1}  # for the timed steps
STEP_TOKENS = 4096  # of a timed batch, in the arms that take tokens: on a CPU more is slower
_NUM_ROWS = 20_000
_LOG_NORMAL = {  # median, sigma and longest, in tokens
    "r1_like": (2300, 0.85, 16_384),
    "chat_like": (300, 1.0, 4096),
}


def load_lengths(name: str, base_dir: Path) -> NDArray[np.int64]:
    """Tokens of each row, in the order of the data set.

    Args:
        base_dir: the demo's base model, whose tokenizer counts the demo's traces.
    """
    if name == "demo_traces":
        return _trace_lengths(base_dir)
    median, sigma, longest = _LOG_NORMAL[name]
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, _NUM_ROWS)
    return np.clip(lengths, 16, longest).astype(np.int64)


def build_micro_batch(shape: Shape, vocab_size: int, seed: int) -> MicroBatch:
    """Random tokens in the batch's shape; every token but the first of a row is a target."""
    generator = torch.Generator().manual_seed(seed)
    lengths = shape.lengths
    rows = 1 if shape.is_packed else len(lengths)
    input_ids_BT = torch.zeros((rows, shape.columns), dtype=torch.long)
    labels_BT = torch.full((rows, shape.columns), IGNORED)
    begin = 0
    for index, length in enumerate(lengths):
        row, column = (0, begin) if shape.is_packed else (index, 0)
        ids = torch.randint(1, vocab_size, (length,), generator=generator)
        input_ids_BT[row, column : column + length] = ids
        labels_BT[row, column : column + length - 1] = ids[1:]
        begin += length
    padding = shape.columns - shape.real
    documents = (*lengths, padding) if padding else lengths
    return MicroBatch(
        input_ids_BT,
        labels_BT,
        num_tokens=shape.real,
        num_targets=shape.real - len(lengths),
        document_lengths=documents if shape.is_packed else None,
    )


def _trace_lengths(base_dir: Path) -> NDArray[np.int64]:
    """The rows that the demo's `prepare` makes, tokenized as it does."""
    from r1ray.config import load_config
    from r1ray.config.prepare import TaskSourceConfig
    from r1ray.data.reasoning import build_messages, draw_heldout, draw_training
    from r1ray.data.schemas import Conversation
    from r1ray.data.tokenize import TokenizedRow, tokenize_rows
    from r1ray.models.tokenizer import Tokenizer

    config = load_config("jobs/configs/demo.yaml")
    source = config.prepare.sources[0]
    assert isinstance(source, TaskSourceConfig)
    heldout = draw_heldout(config.tasks, config.evaluate.num_problems)
    conversations = [
        Conversation(
            [
                *build_messages(problem, config.tasks.system_prompt),
                {"role": "assistant", "content": problem.trace()},
            ]
        )
        for problem in draw_training(config.tasks, source.num_samples, heldout)
    ]
    rows = tokenize_rows(
        Tokenizer(base_dir),
        conversations,
        max_tokens=config.prepare.max_tokens,
        overflow=config.prepare.overflow,
    )
    return np.array(
        [len(row.samples[0].input_ids) for row in rows if isinstance(row, TokenizedRow)]
    )
