"""What comes out of the tokenizing tasks, counted; samples go on, bad rows into quarantine."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from r1ray.config.prepare import BucketsConfig, PrepareConfig
from r1ray.data.length_sketch import LengthSketch
from r1ray.data.reservoir import Replay
from r1ray.data.tokenize_table import sample_schema
from r1ray.errors import ArtifactError

__all__ = ["QUARANTINE_NAME", "SampleCollector"]

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
_MAX_IGNORED_NAMES = 100  # names come from the data; more are counted together


class SampleCollector:
    """Iterates over the usable samples, table by table; counts them and files the bad rows.

    Args:
        results: tables of `tokenize_table.RESULT_SCHEMA`.
        replay: mixes earlier samples into them.

    Attributes:
        counts, ignored, sketch, answers: complete once the iteration is over; the last two count
            what is trained on, replayed samples too, `answers` by their targets.
    """

    def __init__(
        self,
        results: Iterable[pa.Table],
        out_dir: Path,
        config: PrepareConfig,
        on_rows: Callable[[int], None],
        replay: Replay | None = None,
    ) -> None:
        self._replay = replay
        self._results, self._out_dir = results, out_dir
        self._max_quarantined_share = config.max_quarantined_share
        self._on_rows, self._schema = on_rows, sample_schema(config)
        self.counts = Counter(
            num_rows=0, num_samples=0, num_quarantined=0, num_over_long=0, num_dropped_pieces=0
        )
        self.ignored: Counter[str] = Counter()
        batching = config.batching
        is_exact = isinstance(batching, BucketsConfig) and batching.fit_rows is None
        self.sketch = LengthSketch(bits=None if is_exact else 8)
        self.answers = LengthSketch()

    def __iter__(self) -> Iterator[pa.Table]:
        """Tables of `tokenize_table.sample_schema`.

        Raises:
            ArtifactError: too large a share of the rows had to be quarantined, or none is left.
        """
        with (self._out_dir / QUARANTINE_NAME).open("w", encoding="utf-8") as quarantine:
            for table in self._results:
                if table.num_rows == 0:
                    continue
                for row in table.filter(pc.is_valid(table["error"])).to_pylist():
                    line = {name: row[name] for name in ("source", "row", "error", "excerpt")}
                    quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
                good = table.filter(pc.is_null(table["error"]))
                self._count(table, good)
                self._on_rows(self.counts["num_rows"])
                if good.num_rows:
                    yield self._mix(good.select(self._schema.names).cast(self._schema))
        _check_counts(self.counts, self._max_quarantined_share, self._out_dir)

    def _count(self, table: pa.Table, good: pa.Table) -> None:
        self.counts.update(
            num_rows=pc.sum(pc.equal(table["piece"], 0)).as_py(),
            num_samples=good.num_rows,
            num_quarantined=table.num_rows - good.num_rows,
            num_over_long=pc.sum(table["was_over_long"]).as_py(),
            num_dropped_pieces=pc.sum(table["num_dropped_pieces"]).as_py() or 0,
        )
        for name in table["ignored"].drop_null().combine_chunks().flatten().to_pylist():
            is_known = name in self.ignored or len(self.ignored) < _MAX_IGNORED_NAMES
            self.ignored[name if is_known else "others"] += 1

    def _mix(self, samples: pa.Table) -> pa.Table:
        if self._replay is not None:
            samples = self._replay.mix(samples)
            self.counts["num_replayed"] = self._replay.num_replayed
        self.sketch.add(pc.list_value_length(samples["input_ids"]).to_numpy())
        self.answers.add(_count_targets(samples["is_target"].combine_chunks()))
        return samples


def _count_targets(is_target: pa.ListArray) -> NDArray[np.int64]:
    """Of each sample; every one has some."""
    flat = is_target.values.to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(flat, dtype=np.int64)])
    return np.diff(before[is_target.offsets.to_numpy()])


def _check_counts(counts: Counter[str], max_quarantined_share: float, out_dir: Path) -> None:
    bad, rows = counts["num_quarantined"], counts["num_rows"]
    where = f"reasons are in {out_dir / QUARANTINE_NAME}"
    if bad:
        logger.warning("%d of %d rows quarantined; %s", bad, rows, where)
    if counts["num_samples"] == 0:
        raise ArtifactError(f"prepare: none of {rows} rows is usable; {where}")
    if bad > max_quarantined_share * rows:
        raise ArtifactError(
            f"prepare: {bad} of {rows} rows quarantined, above prepare.max_quarantined_share "
            f"({max_quarantined_share}); {where}"
        )
