"""The BatchSet: Parquet files in which one row is one micro-batch, and their reader.

Ray Data cannot cut batches by tokens (ray#49844), so a whole batch travels as one row: it streams,
and every rank takes the same number of steps. Tokens are stored unpadded; the reader pads a batch
to its bucket's ceiling.

Reading one batch costs its row group (64 batches), of which the latest 16 are kept decoded: in a
shuffled BatchSet of more than 1,024 batches nearly every read decodes one.

Shape legend: B rows of a batch, T tokens (the ceiling).
"""

import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from r1ray.errors import ArtifactError, ShapeError

__all__ = [
    "BATCHES_NAME",
    "BATCH_SCHEMA",
    "IGNORED",
    "SUMMARY_NAME",
    "BatchSet",
    "MicroBatch",
    "plan_order",
]

BATCHES_NAME = "batches.parquet"
SUMMARY_NAME = "summary.json"
ROW_GROUP_BATCHES = 64
IGNORED = -100  # label of a position that the loss leaves out

BATCH_SCHEMA = pa.schema(
    [
        ("ceiling", pa.int32()),  # T
        ("lengths", pa.list_(pa.int32())),  # real tokens of each of the B rows
        ("input_ids", pa.list_(pa.int32())),  # the rows one after the other, unpadded
        ("is_target", pa.list_(pa.bool_())),  # aligned with input_ids
    ]
)


@dataclass(frozen=True)
class MicroBatch:
    """One padded batch.

    Attributes:
        input_ids_BT: int64, padded with 0 on the right.
        labels_BT: int64; the token that follows each position, IGNORED where no target follows.
        num_tokens: real tokens, padding excluded.
        num_targets: labels that are not IGNORED.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    num_tokens: int
    num_targets: int


class BatchSet:
    """Random access to the micro-batches that `prepare` wrote into `directory`."""

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory) / BATCHES_NAME
        try:
            self._file = pq.ParquetFile(path)
            self.summary: dict[str, Any] = json.loads(
                (Path(directory) / SUMMARY_NAME).read_text(encoding="utf-8")
            )
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{path}: no readable BatchSet ({error})") from error
        metadata = self._file.metadata
        self._group_starts = [0]
        for group in range(metadata.num_row_groups):
            self._group_starts.append(self._group_starts[-1] + metadata.row_group(group).num_rows)
        self._read_group = functools.lru_cache(maxsize=16)(self._file.read_row_group)

    def __len__(self) -> int:
        return self._group_starts[-1]

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self):
            raise ShapeError(f"batch {index} is not in a BatchSet of {len(self)}")
        group = next(g for g, end in enumerate(self._group_starts[1:]) if index < end)
        table = self._read_group(group)
        row = {
            name: table.column(name)[index - self._group_starts[group]].as_py()
            for name in BATCH_SCHEMA.names
        }
        return _pad(row)


def _pad(row: dict[str, Any]) -> MicroBatch:
    lengths = row["lengths"]
    shape = (len(lengths), row["ceiling"])
    input_ids_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.long)
    start = 0
    for index, length in enumerate(lengths):
        ids = torch.tensor(row["input_ids"][start : start + length])
        is_target = torch.tensor(row["is_target"][start : start + length])
        input_ids_BT[index, :length] = ids
        labels_BT[index, : length - 1] = torch.where(is_target[1:], ids[1:], IGNORED)
        start += length
    return MicroBatch(input_ids_BT, labels_BT, start, int((labels_BT != IGNORED).sum()))


def plan_order(
    num_batches: int, *, seed: int, start: int, world_size: int, rank: int
) -> Iterator[tuple[int, int]]:
    """(global position, batch index) of this rank's batches from position `start` on, forever.

    Epoch e shuffles all batches by (seed, e); position p belongs to rank (p - start) % world_size.
    Any world size that continues at `start` therefore neither repeats nor leaves out a batch.
    """
    position = start + rank
    epoch, order = -1, []
    while True:
        if position // num_batches != epoch:
            epoch = position // num_batches
            order = shuffled(range(num_batches), f"{seed}-{epoch}")
        yield position, order[position % num_batches]
        position += world_size


def shuffled(items: Sequence[int], seed: str) -> list[int]:
    """`items` in a random order that depends on `seed` alone."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order
