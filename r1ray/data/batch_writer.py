"""From tokenized samples to the BatchSet's file, window by window, in arrow arrays throughout.

1. Samples gather to a window of 65,536 samples, 16 million tokens or 256 MiB of images, whichever
   comes first: the larger it is, the closer in length are the rows of a batch. A planner may ask
   for smaller ones.
2. The planner says which of them make batches; the others stay for the next window.
3. One `take` brings the samples into batch order; offsets alone make them rows of `BATCH_SCHEMA`.

Price: two copies of the window's tokens. Memory is bounded by two windows and the samples that a
planner holds back, whatever the number of rows.
"""

from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from r1ray.config.prepare import BucketsConfig, PackingConfig, PrepareConfig
from r1ray.data.batch_set import BATCH_SCHEMA, BATCHES_NAME
from r1ray.data.bucketing import PlannedBatch
from r1ray.data.planners import BatchPlanner
from r1ray.data.tokenize_table import IMAGES, sample_schema

__all__ = ["WINDOW_SAMPLES", "WINDOW_TOKENS", "BatchWriter"]

WINDOW_SAMPLES = 65_536
WINDOW_TOKENS = 16 << 20
_WINDOW_IMAGE_BYTES = 256 << 20
_GROUP_TOKENS = 256 << 10  # of a row group: what reading one batch decodes


class BatchWriter:
    """Writes `batches.parquet` into a directory; a context manager.

    Args:
        config: its `batching` and `batch_tokens` decide the layout; the planner decides the rest.
    """

    def __init__(self, directory: Path, planner: BatchPlanner, config: PrepareConfig) -> None:
        self._planner = planner
        self._window_samples = min(WINDOW_SAMPLES, planner.max_new_samples or WINDOW_SAMPLES)
        self._is_packed = isinstance(config.batching, PackingConfig)
        self._pads_to_longest = (
            isinstance(config.batching, BucketsConfig) and config.batching.pad_to == "longest"
        )
        self._group_size = max(1, _GROUP_TOKENS // config.batch_tokens)
        self._schema = BATCH_SCHEMA.append(IMAGES) if config.has_images else BATCH_SCHEMA
        self._file = pq.ParquetWriter(directory / BATCHES_NAME, self._schema, compression="zstd")
        self._left = sample_schema(config).empty_table()
        self._new: list[pa.Table] = []
        self._num_new = self._new_tokens = self._new_image_bytes = 0
        self._counts = Counter(num_batches=0, num_tokens=0, num_targets=0, computed=0)
        self._largest = 0
        self._per_ceiling: Counter[int] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._cut(is_last=True)
        finally:
            self._file.close()

    def add(self, samples: pa.Table) -> None:
        """Take in samples, a table of `sample_schema`."""
        self._new.append(samples)
        self._num_new += samples.num_rows
        self._new_tokens += pc.sum(pc.list_value_length(samples["input_ids"])).as_py() or 0
        if IMAGES.name in samples.column_names:
            self._new_image_bytes += samples[IMAGES.name].nbytes
        if (
            self._num_new >= self._window_samples
            or self._new_tokens >= WINDOW_TOKENS
            or self._new_image_bytes >= _WINDOW_IMAGE_BYTES
        ):
            self._cut(is_last=False)

    def summarize(self) -> dict[str, Any]:
        """Counts, padding and shapes of what was written."""
        counts = dict(self._counts)
        computed = counts.pop("computed")
        return {
            **counts,
            "padding_share": 1.0 - counts["num_tokens"] / computed if computed else 0.0,
            "max_batch_tokens": self._largest,
            "batches_per_ceiling": {
                str(top): self._per_ceiling[top] for top in sorted(self._per_ceiling)
            },
            "fits": [
                {
                    "first_sample": fit.first_sample,
                    "ceilings": list(fit.ceilings),
                    "distance": fit.distance,
                }
                for fit in self._planner.fits
            ],
        }

    def _cut(self, *, is_last: bool) -> None:
        window = pa.concat_tables([self._left, *self._new]).combine_chunks()
        if window.num_rows == 0:
            return
        lengths = pc.list_value_length(window["input_ids"]).to_numpy().astype(np.int64)
        batches, left = self._planner.plan(lengths, self._num_new, is_last=is_last)
        self._left = window.take(np.sort(left))
        self._new, self._num_new = [], 0
        self._new_tokens = self._new_image_bytes = 0
        if batches:
            self._write(window, lengths, batches)

    def _write(
        self, window: pa.Table, lengths: NDArray[np.int64], batches: list[PlannedBatch]
    ) -> None:
        order = np.concatenate([batch.rows for batch in batches])
        samples = window.take(order).combine_chunks()
        lengths = lengths[order]
        row_offsets = _offsets([len(batch.rows) for batch in batches])
        sample_offsets = _offsets(lengths)
        token_offsets = sample_offsets[row_offsets]
        firsts = sample_offsets[:-1]  # nothing predicts the first token of a sample
        input_ids, is_target = (
            samples[name].chunk(0).flatten() for name in ("input_ids", "is_target")
        )
        ceilings = np.array([batch.ceiling for batch in batches])
        widths = ceilings
        if self._pads_to_longest:
            widths = np.maximum.reduceat(lengths, row_offsets[:-1])
        columns = [
            pa.array(widths, pa.int32()),
            pa.array([self._is_packed] * len(batches)),
            _lists(row_offsets, pa.array(lengths, pa.int32())),
            _lists(token_offsets, input_ids),
            _lists(token_offsets, is_target),
        ]
        if self._schema is not BATCH_SCHEMA:
            images = samples[IMAGES.name].chunk(0)
            counts = pc.fill_null(pc.list_value_length(images), 0).to_numpy()
            columns.append(_lists(_offsets(counts)[row_offsets], images.flatten()))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._file.write_table(table, row_group_size=self._group_size)
        num_rows = np.ones(len(batches), int) if self._is_packed else np.diff(row_offsets)
        shapes = widths * num_rows
        self._counts.update(
            num_batches=len(batches),
            num_tokens=int(token_offsets[-1]),
            num_targets=pc.sum(is_target).as_py() - pc.sum(is_target.take(firsts)).as_py(),
            computed=int(shapes.sum()),
        )
        self._largest = max(self._largest, int(shapes.max()))
        self._per_ceiling.update(ceilings.tolist())


def _offsets(lengths: NDArray[np.int64] | list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
