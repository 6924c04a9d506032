"""Length buckets with the least padding, and batches cut to a token budget. Pure; no Ray.

1. `fit_histogram_ceilings` chooses K ceilings by exact dynamic programming over the M distinct
   lengths: a bucket costs what its rows cost when padded to the longest of them. Adding a bucket
   minimises, for every end e, best[b] + (rows(e) - rows(b)) * cost(e) over the begin b: the lower
   envelope of lines with ascending slopes. It is the lower convex hull of the points (rows(b),
   best[b]), and each e finds its tangent by binary search: O(K·M·log M), all in array operations.
2. `plan_batches` sorts rows by length within their bucket and cuts them so that rows times
   cost(ceiling) never exceeds the budget: that is the memory bound of a training step.

What a row of length l costs is l, or l + l²/q where attention counts (`cost_of_length`).

Source: the quadratic cost is that of Lhotse's samplers (`quadratic_duration`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from r1ray.errors import ShapeError

__all__ = [
    "PlannedBatch",
    "cost_of_length",
    "fit_bucket_ceilings",
    "fit_histogram_ceilings",
    "plan_batches",
]


@dataclass(frozen=True)
class PlannedBatch:
    """One batch to be built.

    Attributes:
        ceiling: columns of the batch, in tokens.
        rows: indices of its rows; a packed batch lays them one after the other in a single row.
    """

    ceiling: int
    rows: NDArray[np.int64]


def cost_of_length(lengths: ArrayLike, quadratic_tokens: int | None = None) -> NDArray[np.float64]:
    """What rows of these lengths cost in tokens: l, or l + l²/quadratic_tokens.

    Args:
        quadratic_tokens: the length at which attention costs as much as all the rest.
    """
    values = np.asarray(lengths, dtype=np.float64)
    return values if quadratic_tokens is None else values + values * values / quadratic_tokens


def fit_bucket_ceilings(
    lengths: Sequence[int] | NDArray[np.integer],
    num_buckets: int,
    *,
    max_padding_share: float | None = None,
    quadratic_tokens: int | None = None,
) -> list[int]:
    """At most `num_buckets` ascending ceilings with the least total padding of `lengths`.

    Args:
        max_padding_share: stop at the smallest number of buckets whose padding is at most this
            share of the padded cost.
        quadratic_tokens: see `cost_of_length`.
    Raises:
        ShapeError: no lengths, a length below 1, or num_buckets below 1.
    """
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    return fit_histogram_ceilings(
        dict(zip(values.tolist(), counts.tolist(), strict=True)),
        num_buckets,
        max_padding_share=max_padding_share,
        quadratic_tokens=quadratic_tokens,
    )


def fit_histogram_ceilings(
    counts: Mapping[int, int],
    num_buckets: int,
    *,
    max_padding_share: float | None = None,
    quadratic_tokens: int | None = None,
) -> list[int]:
    """As `fit_bucket_ceilings`, from length -> number of rows."""
    if num_buckets < 1 or not counts or min(counts) < 1:
        raise ShapeError(
            f"buckets need lengths >= 1 and num_buckets >= 1, got {len(counts)} distinct lengths, "
            f"shortest {min(counts, default=None)}, num_buckets {num_buckets}"
        )
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    costs = cost_of_length(values, quadratic_tokens)
    rows = np.concatenate([[0], weights.cumsum()])  # rows[j]: rows of the first j lengths
    real = float((weights * costs).sum())
    # best[j]: least padded cost of the first j lengths with the buckets so far.
    best = np.concatenate([[0.0], np.full(len(values), np.inf)])
    splits: list[NDArray[np.int64]] = []
    for _ in range(min(num_buckets, len(values))):
        best, split = _add_bucket(best, costs, rows)
        splits.append(split)
        if max_padding_share is not None and real >= (1.0 - max_padding_share) * best[-1]:
            break
    ceilings, end = [], len(values)
    for split in reversed(splits):
        if split[end] < end:
            ceilings.append(int(values[end - 1]))
            end = int(split[end])
    return ceilings[::-1]


def _add_bucket(
    best: NDArray[np.float64], costs: NDArray[np.float64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Least costs with one more bucket, and where that bucket begins.

    A begin at or beyond the end never costs less than leaving the bucket empty, so the search need
    not exclude it.
    """
    hull, slopes = _lower_hull(best, rows)
    begin = hull[np.searchsorted(slopes, costs, side="left")]
    ends = np.arange(1, len(costs) + 1)
    begin = np.minimum(begin, ends)
    begins = np.concatenate([[0], begin])
    totals = best[begins] + (rows - rows[begins]) * np.concatenate([[0.0], costs])
    return totals, begins


def _lower_hull(
    best: NDArray[np.float64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices of the points (rows, best) on their lower convex hull, and the slopes between them.

    A point on or above the line through any two others is not on the hull, so all that are above
    the line of the points `stride` before and after them go at once; near strides after far ones
    leave few rounds to do, whatever the distribution.
    """
    hull = np.flatnonzero(np.isfinite(best))
    stride = max(1, len(hull) // 4)
    while len(hull) > 2:
        before, here, after = hull[: -2 * stride], hull[stride:-stride], hull[2 * stride :]
        left = (best[here] - best[before]) / (rows[here] - rows[before])
        right = (best[after] - best[here]) / (rows[after] - rows[here])
        is_below = right > left
        if stride == 1 and is_below.all():
            break
        hull = np.concatenate([hull[:stride], here[is_below], hull[-stride:]])
        stride = max(1, min(stride // 2, (len(hull) - 1) // 2))
    return hull, np.diff(best[hull]) / np.diff(rows[hull])


def plan_batches(
    lengths: ArrayLike,
    ceilings: Sequence[int],
    batch_tokens: int,
    *,
    quadratic_tokens: int | None = None,
    keep_partial: bool = True,
) -> tuple[list[PlannedBatch], NDArray[np.int64]]:
    """(batches, rows left over); each row is in exactly one batch or left over.

    Args:
        keep_partial: make a batch of the last rows of a bucket even where more would fit. Without
            it they are left over, for a caller that has more rows to come.
    Raises:
        ShapeError: a length exceeds the last ceiling, or a ceiling costs more than the budget.
    """
    values = np.asarray(lengths, dtype=np.int64)
    tops = np.asarray(ceilings, dtype=np.int64)
    if len(values) and values.max() > tops[-1]:
        raise ShapeError(f"length {values.max()} is above the last ceiling {tops[-1]}")
    costs = cost_of_length(tops, quadratic_tokens)
    if costs[-1] > batch_tokens:
        costing = "is" if quadratic_tokens is None else f"costs {costs[-1]:.0f} tokens,"
        raise ShapeError(
            f"ceiling {tops[-1]} {costing} above batch_tokens {batch_tokens}; raise batch_tokens"
        )
    rows_per_batch = (batch_tokens // costs).astype(np.int64)
    order = np.argsort(values, kind="stable")
    ends = np.searchsorted(values[order], tops, side="right")
    batches, left = [], []
    begin = 0
    for top, end, per_batch in zip(tops.tolist(), ends.tolist(), rows_per_batch, strict=True):
        last_full = end if keep_partial else begin + (end - begin) // per_batch * per_batch
        batches += [
            PlannedBatch(top, order[start : min(start + per_batch, last_full)])
            for start in range(begin, last_full, per_batch)
        ]
        left.append(order[last_full:end])
        begin = end
    return batches, np.concatenate(left)
