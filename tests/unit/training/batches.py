"""Random micro-batches for training tests."""

import torch

from r1ray.data.batch_set import IGNORED, MicroBatch
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
