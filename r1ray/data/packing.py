"""Sequence packing: documents laid end to end in batches of one row, by best-fit decreasing.

1. `pack_best_fit` takes the documents from long to short and puts each where it leaves the least
   room. Documents of equal length go together: a bin takes as many of them as fit, which gives the
   same bins and makes short documents cheap. Bins with equal room are interchangeable, so it is
   enough to know which amounts of room exist: a sorted list, searched by bisection.
2. Where few documents make a bin, and many have the same length, best-fit leaves gaps that nothing
   fits. The documents of loose bins are then packed anew: each bin takes the longest one left, and
   the subset of the others that fills it best, found exactly over the bits of a whole number.
3. `plan_packs` does both for one window of a stream, and leaves the documents of bins that are
   still loose for the next.

Price: about 1 µs a document, and at most about a second a window where step 2 is at work. The
padding is what the last bin of a stream lacks, plus the rounding of every batch to a multiple of 64
tokens.

Source: best-fit decreasing needs at most 11/9 of the optimal number of bins (Johnson 1973).
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import ArrayLike, NDArray

from r1ray.data.bucketing import PlannedBatch, cost_of_length
from r1ray.errors import ShapeError

__all__ = ["PACK_MULTIPLE", "pack_best_fit", "plan_packs"]

PACK_MULTIPLE = 64  # tokens; a packed batch is padded to a multiple of it
_LOOSE_SHARE = 0.002  # of the capacity: a bin with more room than this is loose
_MAX_REFILL_WORK, _MAX_REFILL_WORDS = 1e8, 4e6  # machine words, in all and held for one bin


def pack_best_fit(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Indices of the documents of each bin, longest first; no bin exceeds `capacity`.

    Args:
        lengths: whole numbers >= 1.
    Raises:
        ShapeError: a length is below 1 or above the capacity.
    """
    values = np.asarray(lengths, dtype=np.int64)
    if len(values) == 0:
        return []
    if not 1 <= values.min() <= values.max() <= capacity:
        raise ShapeError(
            f"packing needs lengths between 1 and the capacity {capacity}, got lengths from "
            f"{values.min()} to {values.max()}; raise the capacity or cut the documents"
        )
    order = np.argsort(-values, kind="stable")
    distinct, starts = np.unique(-values[order], return_index=True)
    ends = [*starts[1:].tolist(), len(values)]
    documents: list[int] = order.tolist()
    bins: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room, ascending
    with_room: dict[int, list[int]] = {}  # room -> bins that have it
    for negated, start, end in zip(distinct.tolist(), starts.tolist(), ends, strict=True):
        length = -negated
        while start < end:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                waiting = with_room[room]
                target = waiting.pop()
                if not waiting:
                    del rooms[place], with_room[room]
            else:
                room, target = capacity, len(bins)
                bins.append([])
            count = min(end - start, room // length)
            bins[target] += documents[start : start + count]
            start += count
            room -= count * length
            if room in with_room:
                with_room[room].append(target)
            elif room:
                with_room[room] = [target]
                insort(rooms, room)
    return bins


def plan_packs(
    lengths: ArrayLike,
    batch_tokens: int,
    *,
    quadratic_tokens: int | None = None,
    keep_partial: bool = True,
) -> tuple[list[PlannedBatch], NDArray[np.int64]]:
    """(batches, rows left over); each row is in exactly one batch or left over.

    Args:
        batch_tokens: bound on the summed cost of a batch's documents (`bucketing.cost_of_length`).
        keep_partial: make a batch of every bin. Without it the documents of loose bins are left
            over, for a caller that has more rows to come: at most half of them, and of their cost.
    Raises:
        ShapeError: a document costs more than the budget.
    """
    values = np.asarray(lengths, dtype=np.int64)
    costs = np.ceil(cost_of_length(values, quadratic_tokens)).astype(np.int64)
    bins = _refill_loose(costs, pack_best_fit(costs, batch_tokens), batch_tokens)
    left: list[int] = []
    if not keep_partial:
        bins.sort(key=lambda rows: -int(costs[rows].sum()))
        tight = (1.0 - _LOOSE_SHARE) * batch_tokens
        while bins and costs[bins[-1]].sum() < tight:
            grown = left + bins[-1]
            if 2 * len(grown) > len(costs) or 2 * costs[grown].sum() > costs.sum():
                break
            left = grown
            bins.pop()
    batches = [
        PlannedBatch(_round_up(int(values[rows].sum()), batch_tokens), np.array(rows, np.int64))
        for rows in bins
    ]
    return batches, np.array(left, dtype=np.int64)


def _refill_loose(
    costs: NDArray[np.int64], bins: list[list[int]], capacity: int
) -> list[list[int]]:
    """`bins` with the documents of loose ones packed anew, unless that takes more of them.

    Many distinct lengths or wide bins are left as they are: best-fit does well there.
    """
    tight = (1.0 - _LOOSE_SHARE) * capacity
    is_loose = [costs[rows].sum() < tight for rows in bins]
    loose = [rows for rows, flag in zip(bins, is_loose, strict=True) if flag]
    waiting: dict[int, list[int]] = {}  # length -> documents, lengths descending
    for row in sorted((row for rows in loose for row in rows), key=lambda row: -costs[row]):
        waiting.setdefault(int(costs[row]), []).append(row)
    words = len(waiting) * capacity / 64
    if len(loose) < 2 or words > _MAX_REFILL_WORDS or words * len(loose) > _MAX_REFILL_WORK:
        return bins
    refilled = []
    while waiting:
        chosen = _fill_one(waiting, capacity)
        refilled.append([_take(waiting, length) for length in chosen])
    if len(refilled) > len(loose):
        return bins
    return [rows for rows, flag in zip(bins, is_loose, strict=True) if not flag] + refilled


def _fill_one(waiting: dict[int, list[int]], capacity: int) -> list[int]:
    """Lengths that fill one bin best, with the longest of those that wait among them.

    Bit n of `sums` is set where some documents add up to n; shifting by a length adds it to all. A
    length that occurs often is added 1, 2, 4, ... times at once.
    """
    longest = next(iter(waiting))
    room = capacity - longest
    mask = (1 << (room + 1)) - 1
    sums, added = 1, []
    for length, rows in waiting.items():
        count = min(len(rows) - (length == longest), room // length)
        times = 1
        while count > 0:
            times = min(times, count)
            added.append((length, times, sums))
            sums |= (sums << (length * times)) & mask
            count -= times
            times *= 2
        if sums >> room:
            break
    best = sums.bit_length() - 1
    chosen = [longest]
    for length, times, before in reversed(added):
        if not before >> best & 1:
            chosen += [length] * times
            best -= length * times
    return chosen


def _take(waiting: dict[int, list[int]], length: int) -> int:
    rows = waiting[length]
    row = rows.pop()
    if not rows:
        del waiting[length]
    return row


def _round_up(num_tokens: int, batch_tokens: int) -> int:
    rounded = -(-num_tokens // PACK_MULTIPLE) * PACK_MULTIPLE
    return max(num_tokens, min(rounded, batch_tokens))
