"""What one forward of `NativeLayers` is asked to do, as its kernel takes it.

Which queries are attended together, how many blocks each unit keeps, which blocks are complete now,
and how the cache lies in memory.
"""

import ctypes
from typing import Any

from r1ray.models.kv_cache import CacheBuffers, CacheSlice
from r1ray.models.sparse import SparseForward, cut_units
from r1ray.ops import native
from r1ray.ops.block_selection import BLOCK, count_both, count_chosen

__all__ = ["list_completed", "list_places", "plan_pieces"]


def list_places(buffers: CacheBuffers) -> dict[str, Any]:
    """The fields that tell where rows lie; what they are of has to stay until the call."""
    has_blocks = buffers.block_keys.numel() > 0
    return {
        "keys": buffers.keys.data_ptr(),
        "values": buffers.values.data_ptr(),
        "summaries": buffers.block_keys.data_ptr() if has_blocks else None,
        "pages": buffers.pages_RC.data_ptr(),
        "row_pages": buffers.pages_RC.shape[1],
        "layer_pages": buffers.keys.shape[2],
    }


def plan_pieces(cache: CacheSlice, tokens: int, *, is_dense: bool) -> tuple[Any, Any]:
    """(pieces, numbers): which new tokens are attended together, and blocks each unit keeps.

    All rows go together where they have one token each, or attend densely in whole blocks; else
    each by itself, cut at the bounds of blocks.
    """
    starts, one_by_one = cache.starts, cache.one_by_one
    rows = range(len(starts))
    if tokens == 1:
        cuts = [(rows, slice(0, 1), 1)]
    else:
        cuts = [
            (range(row, row + 1), part, unit)
            for row in rows
            for part, unit in cut_units(starts[row], tokens, one_by_one=one_by_one)
        ]
    numbers, pieces = list(starts), []
    for of_rows, part, unit in cuts:
        firsts = [starts[row] + part.start for row in of_rows]
        owns = [
            (first + at) // BLOCK
            for first in firsts
            for at in range(0, part.stop - part.start, unit)
        ]
        counts = [max(0, own - 1) if is_dense else count_chosen(own) for own in owns]
        marked = counts if is_dense or unit > 1 else [count_both(own) for own in owns]
        at = len(numbers)
        numbers += [*firsts, *counts, *marked]
        pieces.append(
            native.QueryPiece(
                *(of_rows.start, len(of_rows), part.start, part.stop - part.start, unit),
                *(max(counts), max(marked), at, at + len(firsts), at + len(firsts) + len(counts)),
            )
        )
    array = (ctypes.c_int64 * len(numbers))(*numbers)
    return (native.QueryPiece * len(pieces))(*pieces), array


def list_completed(sparse: SparseForward) -> list[native.CompletedBlocks]:
    """As the kernel takes them; `sparse` keeps their tables."""
    return [
        native.CompletedBlocks(
            *(row, blocks.start, blocks.stop - blocks.start), cos.data_ptr(), sin.data_ptr()
        )
        for row, blocks, _, (cos, sin) in sparse.completed
    ]
