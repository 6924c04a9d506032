"""The BatchSet: Parquet files in which one row is one micro-batch, and their reader.

Ray Data cannot cut batches by tokens (ray#49844), so a whole batch travels as one row: it streams,
and every rank takes the same number of steps. Tokens are stored unpadded. A bucketed batch is
padded to its longest sample or its bucket's ceiling, one sample a row; a packed batch is one row,
its samples one after the other.

Reading one batch costs its row group (256 thousand tokens, or one batch where that is more), of
which the latest 16 are kept decoded: in a larger, shuffled BatchSet nearly every read decodes one.

Shape legend: B rows of a batch, T tokens (its columns).
"""

import bisect
import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1ray.errors import ArtifactError, ShapeError
from r1ray.files import TABLE_BYTES, read_json
from r1ray.models.fusion import RowImages
from r1ray.models.images import read_png

__all__ = [
    "BATCHES_NAME",
    "BATCH_SCHEMA",
    "IGNORED",
    "SUMMARY_NAME",
    "BatchBuffers",
    "BatchSet",
    "MicroBatch",
    "plan_order",
    "shuffled",
]

BATCHES_NAME = "batches.parquet"
SUMMARY_NAME = "summary.json"
SIZE_KEY = "max_batch_tokens"  # in the summary: rows x columns of the largest batch
IMAGES_NAME = "images"  # a column more where some batch has any: PNG files, sample by sample
IGNORED = -100  # label of a position that the loss leaves out
_CACHED_GROUPS = 16

BATCH_SCHEMA = pa.schema(
    [
        ("num_columns", pa.int32()),  # T
        ("is_packed", pa.bool_()),  # B = 1, else B samples
        ("lengths", pa.list_(pa.int32())),  # real tokens of each sample
        ("input_ids", pa.list_(pa.int32())),  # the samples one after the other, unpadded
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
        document_lengths: of a packed batch (B = 1), the samples in the row; the padding at its end
            counts as one more, so that they add up to T. None where every row is one sample.
        index: its place in the BatchSet; None where it does not come from one.
        images: of its samples, whose positions have negative ids; None where it is text.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    num_tokens: int
    num_targets: int
    document_lengths: tuple[int, ...] | None = None
    index: int | None = None
    images: RowImages | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on `device`."""
        return dataclasses.replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            images=None if self.images is None else self.images.to(device),
        )


class BatchBuffers:
    """Memory for one batch of any shape up to `max_tokens`, allocated once and reused.

    Every shape is a view of the same memory, so a batch read into it is valid until the next one
    is read.

    Args:
        pinned: page-locked, for copies to a GPU by DMA.
    """

    def __init__(self, max_tokens: int, *, pinned: bool = False) -> None:
        self._input_ids = torch.zeros(max_tokens, dtype=torch.long, pin_memory=pinned)
        self._labels = torch.zeros(max_tokens, dtype=torch.long, pin_memory=pinned)

    def take(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """(input_ids, labels), each int64 [rows, columns], with all padding."""
        input_ids = self._input_ids[: rows * columns].view(rows, columns)
        labels = self._labels[: rows * columns].view(rows, columns)
        return input_ids.zero_(), labels.fill_(IGNORED)


class BatchSet:
    """Random access to the micro-batches that `prepare` wrote into `directory`."""

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory) / BATCHES_NAME
        try:
            self._file = pq.ParquetFile(path)
            self.summary: dict[str, Any] = read_json(
                Path(directory) / SUMMARY_NAME, max_bytes=TABLE_BYTES
            )
        except (OSError, ValueError, pa.ArrowException, ArtifactError) as error:
            raise ArtifactError(f"{path}: no readable BatchSet ({error})") from error
        names = self._file.schema_arrow.names
        self._has_images = names == [*BATCH_SCHEMA.names, IMAGES_NAME]
        is_known = names == BATCH_SCHEMA.names or self._has_images
        if not is_known or SIZE_KEY not in self.summary:
            raise ArtifactError(
                f"{path}: written by another version of r1ray; remove it and prepare again"
            )
        metadata = self._file.metadata
        self._group_starts = [0]
        for group in range(metadata.num_row_groups):
            self._group_starts.append(self._group_starts[-1] + metadata.row_group(group).num_rows)
        self._read_group = functools.lru_cache(maxsize=_CACHED_GROUPS)(self._file.read_row_group)

    def __len__(self) -> int:
        return self._group_starts[-1]

    def __getitem__(self, index: int) -> MicroBatch:
        return self.read(index)

    def build_buffers(self) -> BatchBuffers:
        """Buffers that hold the largest batch of this set."""
        return BatchBuffers(self.summary[SIZE_KEY], pinned=torch.cuda.is_available())

    def read(self, index: int, buffers: BatchBuffers | None = None) -> MicroBatch:
        """Batch `index`, in `buffers` (where the next read overwrites it) or in new memory."""
        if not 0 <= index < len(self):
            raise ShapeError(f"batch {index} is not in a BatchSet of {len(self)}")
        group = bisect.bisect_right(self._group_starts, index) - 1
        table = self._read_group(group)
        row = table.slice(index - self._group_starts[group], 1).combine_chunks()
        lengths, input_ids, is_target = (
            row.column(name).chunk(0).flatten().to_numpy(zero_copy_only=False)
            for name in ("lengths", "input_ids", "is_target")
        )
        num_columns = row.column("num_columns")[0].as_py()
        rows = [int(lengths.sum())] if row.column("is_packed")[0].as_py() else lengths
        shape = (len(rows), num_columns)
        into = (buffers or BatchBuffers(len(rows) * num_columns)).take(*shape)
        num_targets = _fill(into, rows, _shift(input_ids, is_target, lengths), input_ids)
        documents = None if rows is lengths else _add_padding(lengths.tolist(), num_columns)
        images = None
        if self._has_images and (files := row.column(IMAGES_NAME)[0].as_py()):
            images = _place_images(files, into[0].numpy(), documents)
        return MicroBatch(*into, len(input_ids), num_targets, documents, index, images)


def _shift(
    input_ids: NDArray[np.int32], is_target: NDArray[np.bool_], lengths: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Labels of samples that lie one after the other; nothing predicts a sample's first token."""
    labels = np.full(len(input_ids), IGNORED, dtype=np.int32)
    labels[:-1] = np.where(is_target[1:], input_ids[1:], IGNORED)
    labels[np.cumsum(lengths) - 1] = IGNORED
    return labels


def _fill(
    into: tuple[Tensor, Tensor],
    rows: Sequence[int] | NDArray[np.int32],
    labels: NDArray[np.int32],
    input_ids: NDArray[np.int32],
) -> int:
    """Lay tokens and labels out in rows of these lengths; returns the number of targets."""
    input_ids_BT, labels_BT = into
    is_real_BT = np.arange(input_ids_BT.shape[1]) < np.asarray(rows)[:, None]
    input_ids_BT.numpy()[is_real_BT] = input_ids
    labels_BT.numpy()[is_real_BT] = labels
    return int((labels != IGNORED).sum())


def _place_images(
    files: list[bytes], input_ids_BT: NDArray[np.int64], documents: tuple[int, ...] | None
) -> RowImages:
    """The images of a batch; each has as many positions, one after the other."""
    pixels = [read_png(data) for data in files]
    rows, columns = (input_ids_BT < 0).nonzero()
    each = len(rows) // len(files)
    rows, places = rows[::each].tolist(), columns[::each].tolist()
    ends = None
    if documents is not None:
        bounds = np.cumsum(documents)
        ends = tuple(bounds[np.searchsorted(bounds, places, side="right")].tolist())
    return RowImages(torch.from_numpy(np.stack(pixels)), tuple(rows), tuple(places), ends)


def _add_padding(lengths: list[int], num_columns: int) -> tuple[int, ...]:
    padding = num_columns - sum(lengths)
    return (*lengths, padding) if padding else tuple(lengths)


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
