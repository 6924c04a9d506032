"""Length buckets with the least padding, and batches cut to a token budget. Pure; no Ray.

1. `fit_bucket_ceilings` chooses K ceilings by exact dynamic programming over the distinct lengths:
   the cost of a bucket is the padding of its rows to the longest of them. The cost satisfies the
   quadrangle inequality, so the best split moves monotonically and divide and conquer applies:
   O(K·M·log M) for M distinct lengths.
2. `plan_batches` sorts rows by length within their bucket and cuts them so that rows x ceiling
   never exceeds the budget: that is the memory bound of a training step.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from r1ray.errors import ShapeError

__all__ = ["fit_bucket_ceilings", "fit_histogram_ceilings", "plan_batches"]


def fit_bucket_ceilings(lengths: Sequence[int], num_buckets: int) -> list[int]:
    """At most `num_buckets` ascending ceilings with the least total padding of `lengths`.

    Raises:
        ShapeError: no lengths, a length below 1, or num_buckets below 1.
    """
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    return fit_histogram_ceilings(
        dict(zip(values.tolist(), counts.tolist(), strict=True)), num_buckets
    )


def fit_histogram_ceilings(counts: Mapping[int, int], num_buckets: int) -> list[int]:
    """As `fit_bucket_ceilings`, from length -> number of rows."""
    if num_buckets < 1 or not counts or min(counts) < 1:
        raise ShapeError(
            f"buckets need lengths >= 1 and num_buckets >= 1, got {len(counts)} distinct lengths, "
            f"shortest {min(counts, default=None)}, num_buckets {num_buckets}"
        )
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    rows_before = np.concatenate([[0], weights.cumsum()])
    num_lengths = len(values)
    # cost[j]: least sum of ceilings over the rows of the first j lengths. The sum of the rows' own
    # lengths is the same for every choice, so it is left out.
    cost = np.full(num_lengths + 1, np.iinfo(np.int64).max // 4, dtype=np.int64)
    cost[0] = 0
    splits = []
    for _ in range(min(num_buckets, num_lengths)):
        cost, split = _add_bucket(cost, values, rows_before)
        splits.append(split)
    ceilings, end = [], num_lengths
    for split in reversed(splits):
        if end == 0:
            break
        ceilings.append(int(values[end - 1]))
        end = int(split[end])
    return ceilings[::-1]


def _add_bucket(
    cost: NDArray[np.int64], values: NDArray[np.int64], rows_before: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Costs and split points with one more bucket, by divide and conquer."""
    size = len(values)
    best = np.zeros(size + 1, dtype=np.int64)
    split = np.zeros(size + 1, dtype=np.int64)
    stack = [(1, size, 0, size - 1)]  # ends [first, last], candidate splits [low, high]
    while stack:
        first, last, low, high = stack.pop()
        if first > last:
            continue
        end = (first + last) // 2
        begins = slice(low, min(high, end - 1) + 1)
        totals = cost[begins] + (rows_before[end] - rows_before[begins]) * values[end - 1]
        offset = int(totals.argmin())
        best[end], split[end] = totals[offset], low + offset
        stack.append((first, end - 1, low, low + offset))
        stack.append((end + 1, last, low + offset, high))
    return best, split


def plan_batches(
    lengths: Sequence[int], ceilings: Sequence[int], batch_tokens: int
) -> list[tuple[int, list[int]]]:
    """(ceiling, row indices) of every batch; each row is in exactly one.

    Raises:
        ShapeError: a length exceeds the last ceiling, or a ceiling exceeds the budget.
    """
    values = np.asarray(lengths, dtype=np.int64)
    tops = np.asarray(ceilings, dtype=np.int64)
    if len(values) and values.max() > tops[-1]:
        raise ShapeError(f"length {values.max()} is above the last ceiling {tops[-1]}")
    if tops[-1] > batch_tokens:
        raise ShapeError(
            f"ceiling {tops[-1]} is above batch_tokens {batch_tokens}; raise batch_tokens"
        )
    order = np.argsort(values, kind="stable")
    bucket_of = np.searchsorted(tops, values[order])
    batches = []
    for bucket in np.unique(bucket_of):
        rows = order[bucket_of == bucket]
        ceiling = int(tops[bucket])
        per_batch = batch_tokens // ceiling
        batches += [
            (ceiling, rows[start : start + per_batch].tolist())
            for start in range(0, len(rows), per_batch)
        ]
    return batches
