"""A sketch of a length distribution: counts in bins of bounded relative width.

Lengths below 2^bits are counted exactly; above, a bin spans 2^-bits of its value. A bin goes by its
largest length, so that a ceiling taken from the sketch holds every row that it counted.

Price: at most about 2^bits bins per doubling of the length: 3,600 for a million tokens at 8 bits.

Source: the log-linear bins of HdrHistogram.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from r1ray.errors import ShapeError

__all__ = ["LengthSketch"]


class LengthSketch:
    """Counts of lengths, of bounded size.

    Args:
        bits: precision; None counts every length exactly.

    Attributes:
        counts: largest length of a bin -> rows in it.
    """

    def __init__(self, bits: int | None = 8) -> None:
        self.bits = bits
        self.counts: Counter[int] = Counter()

    def add(self, lengths: ArrayLike) -> None:
        """Count `lengths`, whole numbers >= 1."""
        values = np.asarray(lengths, dtype=np.int64)
        if len(values) and values.min() < 1:
            raise ShapeError(f"a length sketch counts lengths >= 1, got {values.min()}")
        bins, counts = np.unique(self._round_up(values), return_counts=True)
        for length, count in zip(bins.tolist(), counts.tolist(), strict=True):
            self.counts[length] += count

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    def quantile(self, share: float) -> int:
        """The length that `share` (0 to 1) of the rows do not exceed."""
        if not self.counts:
            raise ShapeError("an empty length sketch has no quantiles")
        lengths, cumulative = _cumulate(self.counts)
        return int(lengths[np.searchsorted(cumulative, share * cumulative[-1] - 1e-9)])

    def distance(self, other: "LengthSketch") -> float:
        """Kolmogorov-Smirnov: the largest gap between the cumulative shares, 0 to 1."""
        if not self.counts or not other.counts:
            raise ShapeError("an empty length sketch has no distance to another")
        points = np.array(sorted({*self.counts, *other.counts}))
        gaps = _shares_at(self.counts, points) - _shares_at(other.counts, points)
        return float(np.abs(gaps).max())

    def _round_up(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.bits is None:
            return values
        exponent = np.frexp(values.astype(np.float64))[1]  # 2^(exponent-1) <= value < 2^exponent
        width = np.left_shift(np.int64(1), np.maximum(exponent.astype(np.int64) - 1 - self.bits, 0))
        return values | (width - 1)


def _cumulate(counts: Mapping[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = np.array(sorted(counts), dtype=np.int64)
    return lengths, np.cumsum([counts[length] for length in lengths.tolist()])


def _shares_at(counts: Mapping[int, int], points: NDArray[np.int64]) -> NDArray[np.float64]:
    lengths, cumulative = _cumulate(counts)
    before = np.concatenate([[0], cumulative])
    return before[np.searchsorted(lengths, points, side="right")] / cumulative[-1]
