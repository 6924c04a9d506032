"""Who decides which rows of a stream make a batch: ceilings known, ceilings learned, or packing.

A planner sees one window of rows after another. What it leaves over comes back at the front of the
next window; with `is_last` it leaves nothing.

`LearnedBuckets` is for data that is not seen twice: it holds the first `fit_rows` rows back, fits
the ceilings to a sketch of their lengths, and compares every further `DRIFT_ROWS` rows with that
sketch. It fits anew, to those rows, where the Kolmogorov-Smirnov distance exceeds `drift_limit`:
`DRIFT_LIMIT`, and what chance alone exceeds once in a thousand times for so few rows. A shift in
the middle of such a block is thus met twice: by its mixture first, then as it is.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from r1ray.config.prepare import BucketsConfig, PrepareConfig
from r1ray.data.bucketing import PlannedBatch, fit_histogram_ceilings, plan_batches
from r1ray.data.length_sketch import LengthSketch
from r1ray.data.packing import plan_packs

__all__ = [
    "DRIFT_LIMIT",
    "DRIFT_ROWS",
    "BatchPlanner",
    "Fit",
    "FixedBuckets",
    "LearnedBuckets",
    "PackingPlanner",
    "drift_limit",
    "fit_ceilings",
]

logger = logging.getLogger(__name__)

DRIFT_LIMIT = 0.06
DRIFT_ROWS = 4096
_MAX_HELD_TOKENS = 64 << 20  # before the first fit: `fit_rows` long rows may be more than memory
_CHANCE = 1.95  # Kolmogorov's distribution exceeds it once in a thousand times

Plan = tuple[list[PlannedBatch], NDArray[np.int64]]  # batches, rows left over


@dataclass(frozen=True)
class Fit:
    """Ceilings, from which sample on they hold, and how far lengths had drifted then."""

    first_sample: int
    ceilings: tuple[int, ...]
    distance: float | None = None


class BatchPlanner(Protocol):
    """Cuts windows of a stream of rows into batches.

    Attributes:
        fits: the ceilings in the order in which they were used; empty where there are none.
        max_new_samples: how many new samples to show it at once; None for no limit of its own.
    """

    fits: list[Fit]
    max_new_samples: int | None

    def plan(self, lengths: NDArray[np.int64], num_new: int, *, is_last: bool) -> Plan:
        """(batches, rows left over) of a window whose last `num_new` rows were not seen before."""
        ...


class PackingPlanner:
    """Whole samples laid end to end (`data.packing`)."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.fits: list[Fit] = []
        self.max_new_samples: int | None = None

    def plan(self, lengths: NDArray[np.int64], num_new: int, *, is_last: bool) -> Plan:
        del num_new
        return plan_packs(
            lengths,
            self._config.batch_tokens,
            quadratic_tokens=self._config.quadratic_tokens,
            keep_partial=is_last,
        )


class FixedBuckets:
    """Buckets whose ceilings are known before the first row."""

    def __init__(self, config: PrepareConfig, ceilings: list[int]) -> None:
        self._config = config
        self.fits = [Fit(0, tuple(ceilings))]
        self.max_new_samples: int | None = None

    def plan(self, lengths: NDArray[np.int64], num_new: int, *, is_last: bool) -> Plan:
        del num_new
        return _plan_buckets(self._config, self.fits[-1], lengths, is_last)


class LearnedBuckets:
    """Buckets fitted to the first rows, and again when the lengths drift."""

    def __init__(self, config: PrepareConfig, batching: BucketsConfig) -> None:
        assert batching.fit_rows is not None
        self._config, self._batching = config, batching
        self._fit_rows = batching.fit_rows
        self._fitted = LengthSketch()
        self._recent = LengthSketch()
        self._num_samples = 0
        self.fits: list[Fit] = []
        self.max_new_samples: int | None = min(batching.fit_rows, DRIFT_ROWS)

    def plan(self, lengths: NDArray[np.int64], num_new: int, *, is_last: bool) -> Plan:
        self._recent.add(lengths[len(lengths) - num_new :])
        self._num_samples += num_new
        if not self.fits:
            is_enough = self._num_samples >= self._fit_rows or lengths.sum() >= _MAX_HELD_TOKENS
            if not (is_enough or is_last):
                return [], np.arange(len(lengths))
            self._fit(0)
        elif self._recent.num_rows >= DRIFT_ROWS:
            distance = self._recent.distance(self._fitted)
            limit = drift_limit(self._fitted.num_rows, self._recent.num_rows)
            if distance > limit:
                self._fit(self._num_samples - num_new, distance=distance, limit=limit)
            self._recent = LengthSketch()
        return _plan_buckets(self._config, self.fits[-1], lengths, is_last)

    def _fit(self, first_sample: int, *, distance: float | None = None, limit: float = 0.0) -> None:
        """Fit to the recent rows; the last ceiling holds whatever may come."""
        self._fitted, self._recent = self._recent, LengthSketch()
        longest = self._config.max_tokens
        num_others = self._batching.num_buckets - 1
        fitted = []
        if num_others:
            batching = dataclasses.replace(self._batching, num_buckets=num_others)
            fitted = fit_ceilings(self._config, batching, self._fitted)
        ceilings = sorted({min(top, longest) for top in fitted} | {longest})
        self.fits.append(Fit(first_sample, tuple(ceilings), distance))
        if distance is not None:
            logger.info(
                "lengths drifted by %.2f (Kolmogorov-Smirnov, limit %.2f) at sample %d: %d new "
                "ceilings from %d to %d tokens",
                *(distance, limit, first_sample, len(ceilings), ceilings[0], ceilings[-1]),
            )


def _plan_buckets(
    config: PrepareConfig, fit: Fit, lengths: NDArray[np.int64], is_last: bool
) -> Plan:
    return plan_batches(
        lengths,
        fit.ceilings,
        config.batch_tokens,
        quadratic_tokens=config.quadratic_tokens,
        keep_partial=is_last,
    )


def drift_limit(num_fitted: int, num_recent: int) -> float:
    """The Kolmogorov-Smirnov distance beyond which samples of these sizes count as drifted."""
    return DRIFT_LIMIT + _CHANCE * math.sqrt(1 / num_fitted + 1 / num_recent)


def fit_ceilings(config: PrepareConfig, batching: BucketsConfig, sketch: LengthSketch) -> list[int]:
    """The ceilings that the configuration asks for, for rows with these lengths."""
    return fit_histogram_ceilings(
        sketch.counts,
        batching.num_buckets,
        max_padding_share=batching.max_padding_share,
        quadratic_tokens=config.quadratic_tokens,
    )
