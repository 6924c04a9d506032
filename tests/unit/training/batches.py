"""Random micro-batches for training tests."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from r1ray.config.prepare import FileSourceConfig, PackingConfig, PrepareConfig
from r1ray.data.batch_set import IGNORED, SUMMARY_NAME, BatchSet, MicroBatch
from r1ray.data.batch_writer import BatchWriter
from r1ray.data.planners import PackingPlanner
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from tests.unit.oracle import random_ids


def random_batch(rows: int, tokens: int, *, seed: int) -> MicroBatch:
    """Rows of different lengths, padded on the right; about half of the positions are targets."""
    generator = torch.Generator().manual_seed(seed)
    input_ids_BT = random_ids(rows, tokens, seed=seed)
    labels_BT = torch.full_like(input_ids_BT, IGNORED)
    num_tokens = 0
    for row in range(rows):
        length = tokens - row % 4
        input_ids_BT[row, length:] = 0
        is_target = torch.rand(length - 1, generator=generator) < 0.5
        is_target[-1] = True
        labels_BT[row, : length - 1][is_target] = input_ids_BT[row, 1:length][is_target]
        num_tokens += length
    return MicroBatch(input_ids_BT, labels_BT, num_tokens, int((labels_BT != IGNORED).sum()))


def split(batch: MicroBatch, parts: int) -> list[MicroBatch]:
    """The rows of `batch` dealt out to `parts` micro-batches."""
    pieces = []
    for part in range(parts):
        input_ids_BT, labels_BT = batch.input_ids_BT[part::parts], batch.labels_BT[part::parts]
        num_tokens = int((input_ids_BT != 0).sum())
        pieces.append(
            MicroBatch(input_ids_BT, labels_BT, num_tokens, int((labels_BT != IGNORED).sum()))
        )
    return pieces


def random_samples(seed: int) -> pa.Table:
    """Forty samples of 2 to 40 tokens; about half of each one's tokens are targets."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 41, size=40)
    is_target = [rng.random(length) < 0.5 for length in lengths]
    for flags in is_target:
        flags[0], flags[-1] = False, True
    columns = {
        "input_ids": [rng.integers(3, 300, length) for length in lengths],
        "is_target": is_target,
    }
    return pa.table(columns).cast(SAMPLE_SCHEMA)


def write_batch_set(directory: Path, *, seed: int = 0) -> BatchSet:
    """Forty random samples in packed batches."""
    config = PrepareConfig(
        sources=[FileSourceConfig(type="files", paths=["rows.jsonl"])],
        max_tokens=40,
        batch_tokens=150,
        batching=PackingConfig(type="packing"),
    )
    directory.mkdir()
    with BatchWriter(directory, PackingPlanner(config), config) as writer:
        writer.add(random_samples(seed))
    (directory / SUMMARY_NAME).write_text(json.dumps(writer.summarize()))
    return BatchSet(directory)
