"""The logit store: what a teacher thinks of every target of a BatchSet, in Parquet.

1. Targets are those of the micro-batches, row by row: one Parquet row is one micro-batch.
2. A part holds the logits of `PART_BATCHES` micro-batches; parts are written one by one, so that
   an interrupted run goes on where it was.
3. Ids take 16 bits where the vocabulary fits; log-probabilities take 16.

Price: 4 bytes a kept token, or 6 with a vocabulary above 65,536, and 2 for the tail: 130 bytes a
target for 32 tokens, before compression.

Shape legend: P targets, K kept tokens.
"""

import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from r1ray.compression.distillation import SparseTargets, keep_top_k, target_logits
from r1ray.data.batch_set import MicroBatch
from r1ray.errors import ArtifactError, ShapeError
from r1ray.files import read_json
from r1ray.models.decoder import Decoder

__all__ = [
    "INDEX_NAME",
    "PART_BATCHES",
    "LogitIndex",
    "LogitStore",
    "encode_part",
    "part_name",
]

INDEX_NAME = "logits.json"
PART_BATCHES = 32
_CACHED_PARTS = 16
_SHORT_VOCABULARY = 2**16


@dataclass(frozen=True)
class LogitIndex:
    """What a store holds.

    Attributes:
        num_batches, num_targets: of the BatchSet.
        bytes_per_target: of the files, compressed.
    """

    top_k: int
    temperature: float
    vocab_size: int
    num_batches: int
    num_targets: int
    bytes_per_target: float


def part_name(part: int) -> str:
    """File of the micro-batches from `part * PART_BATCHES` on."""
    return f"logits-{part:05d}.parquet"


@torch.inference_mode()
def encode_part(
    teacher: Decoder, batches: Iterable[MicroBatch], *, top_k: int, temperature: float
) -> bytes:
    """The Parquet file of one part.

    Raises:
        ShapeError: `top_k` is above the teacher's vocabulary.
    """
    id_type = np.uint16 if teacher.config.vocab_size <= _SHORT_VOCABULARY else np.uint32
    rows: dict[str, list[Any]] = {"ids": [], "log_probs": [], "tail": []}
    for batch in batches:
        targets = keep_top_k(target_logits(teacher, batch), top_k, temperature)
        targets = targets.to(torch.device("cpu"))
        rows["ids"].append(targets.ids_PK.flatten().numpy().astype(id_type))
        # A kept token below float16's range has next to no mass, a tail below it none at all.
        lowest = torch.finfo(torch.float16).min
        rows["log_probs"].append(targets.log_probs_PK.flatten().clamp(min=lowest).half().numpy())
        rows["tail"].append(targets.tail_P.half().numpy())
    table = pa.table({name: pa.array(values) for name, values in rows.items()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()


class LogitStore:
    """Random access to the logits that were stored in `directory`."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        path = self._directory / INDEX_NAME
        try:
            self.index = LogitIndex(**read_json(path))
        except (ArtifactError, TypeError) as error:
            raise ArtifactError(f"{path}: no readable logit store ({error})") from error
        self._read_part = functools.lru_cache(maxsize=_CACHED_PARTS)(self._load_part)

    def read(self, index: int) -> SparseTargets:
        """The targets of micro-batch `index` of the BatchSet, in the order of its labels."""
        if not 0 <= index < self.index.num_batches:
            raise ShapeError(
                f"batch {index} is not in a logit store of {self.index.num_batches} batches"
            )
        part, row = divmod(index, PART_BATCHES)
        table = self._read_part(part)
        ids, log_probs, tail = (
            _flatten(table.column(name).slice(row, 1)) for name in ("ids", "log_probs", "tail")
        )
        return SparseTargets(
            torch.from_numpy(ids.astype(np.int64)).view(len(tail), self.index.top_k),
            torch.from_numpy(log_probs.astype(np.float32)).view(len(tail), self.index.top_k),
            torch.from_numpy(tail.astype(np.float32)),
        )

    def _load_part(self, part: int) -> pa.Table:
        path = self._directory / part_name(part)
        try:
            return pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error}); remove the store and train again"
            ) from error


def _flatten(column: pa.ChunkedArray) -> NDArray[Any]:
    values: NDArray[Any] = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values
