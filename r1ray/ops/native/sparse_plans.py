"""Checks of what the native block-sparse kernels are called with, and the fields that follow.

The kernels take addresses and strides: what does not fit would be read beyond its end. Checks and
fields depend on nothing but dtypes, shapes and strides, and are kept: a forward asks the same in
each of its layers.

Shape legend: as in `r1ray.ops.native.sparse`.
"""

import ctypes
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.block_selection import BLOCK

__all__ = ["Plan", "layout", "plan_attention", "plan_choice", "plan_exact"]

_FLOAT_KINDS = [(torch.float32, True)] * 3 + [(torch.int64, True)]
_INT8_KINDS = [
    *((torch.float32, True), (torch.int8, True), (torch.int8, True), (torch.int64, True)),
    *((torch.float32, True), (torch.float32, True)),
]  # of the queries, keys, values, blocks and scales: dtype, and whether on the CPU
_EXACT_FLOAT_KINDS = [*_FLOAT_KINDS[:2], (torch.bool, True), (torch.int64, True)]
_EXACT_INT8_KINDS = [
    *(*_INT8_KINDS[:2], (torch.bool, True), (torch.int64, True)),
    (torch.float32, True),
]  # of the queries, keys, marks, blocks and scales

Layout = tuple[torch.dtype, bool, tuple[int, ...], tuple[int, ...]]


def layout(x: Tensor) -> Layout:
    """(dtype, whether on the CPU, shape, strides)."""
    return x.dtype, x.is_cpu, x.shape, x.stride()


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a call but its addresses: layers of one forward share it.

    Attributes:
        has_gaps: some tensor's last dimensions are not contiguous: plan again with copies.
        strides, sizes: fields of the kernel's structure.
        numbers: address of `array`: the starts, and behind them the counts.
    """

    has_gaps: bool
    strides: list[tuple[int, ...]]
    sizes: tuple[int, ...]
    numbers: int
    array: "ctypes.Array[ctypes.c_int64]"


def _plan(
    has_gaps: bool, strides: list[tuple[int, ...]], sizes: tuple[int, ...], numbers: Iterable[int]
) -> Plan:
    values = list(numbers)
    array = (ctypes.c_int64 * len(values))(*values)
    return Plan(has_gaps, strides, sizes, ctypes.addressof(array), array)


@functools.lru_cache(maxsize=64)
def plan_attention(layouts: tuple[Layout, ...], starts: tuple[int, ...]) -> Plan:
    _check_attention(layouts, starts)
    q, k, v, chosen, *scales = layouts
    (batch, heads, tokens, size), (_, groups, keys, _) = q[2], k[2]
    units, most = chosen[2][2:]
    has_gaps = not all(
        (_is_packed(q, 1), _is_packed(k, 2), _is_packed(v, 2), _is_packed(chosen, 4))
    ) or not all(_is_packed(scale, 1) for scale in scales)
    strides = [q[3][:3], k[3][:2], v[3][:2], *[scale[3][:2] for scale in scales or (k, v)]]
    unit = 1 if units == tokens else BLOCK
    sizes = (batch, heads, groups, tokens, keys, size, units, most, unit)
    return _plan(has_gaps, strides, sizes, starts)


@functools.lru_cache(maxsize=64)
def plan_choice(
    layouts: tuple[Layout, ...],
    counts: tuple[tuple[int, ...], ...],
    starts: tuple[int, ...],
    unit: int,
) -> Plan:
    _check_choice(layouts, counts, starts, unit)
    q, _, _, cos, sin, keys = layouts
    (batch, tokens, heads, size), (_, groups, blocks, _) = q[2], keys[2]
    has_gaps = cos[3] != sin[3] or not all(
        _is_packed(item, dims) for item, dims in zip(layouts, (1, 3, 1, 1, 1, 2), strict=True)
    )
    rotary = (cos[3][0] if cos[2][0] > 1 else 0, cos[3][2])
    most = max((max(row, default=0) for row in counts), default=0)
    sizes = (batch, tokens, heads, groups, size, blocks, -(-tokens // unit), most, unit)
    numbers = itertools.chain(starts, itertools.chain.from_iterable(counts))
    return _plan(has_gaps, [q[3][:3], rotary, keys[3][:2]], sizes, numbers)


@functools.lru_cache(maxsize=64)
def plan_exact(
    layouts: tuple[Layout, ...], counts: tuple[tuple[int, ...], ...], starts: tuple[int, ...]
) -> Plan:
    _check_exact(layouts, counts, starts)
    q, k, _, chosen, *scale = layouts
    (batch, heads, tokens, size), groups = q[2], k[2][1]
    units, most = chosen[2][2:]
    has_gaps = not (_is_packed(q, 1) and _is_packed(k, 2)) or not all(
        _is_packed(item, 1) for item in scale
    )
    strides = [q[3][:3], k[3][:2], *[item[3][:2] for item in scale or (k,)]]
    unit = 1 if units == tokens else BLOCK
    sizes = (batch, heads, groups, tokens, size, units, most, unit)
    numbers = itertools.chain(starts, itertools.chain.from_iterable(counts))
    return _plan(has_gaps, strides, sizes, numbers)


def _is_packed(item: Layout, dims: int) -> bool:
    """Whether the last `dims` dimensions lie in memory without gaps."""
    run = 1
    for size, stride in zip(item[2][: -dims - 1 : -1], item[3][: -dims - 1 : -1], strict=True):
        if stride != run and size > 1:
            return False
        run *= size
    return True


def _check_attention(layouts: tuple[Layout, ...], starts: tuple[int, ...]) -> None:
    kinds = [item[:2] for item in layouts]
    q, k, v, chosen, *scales = [item[2] for item in layouts]
    if (
        kinds not in (_FLOAT_KINDS, _INT8_KINDS)
        or not len(q) == len(k) == len(chosen) == 4
        or v != k
        or q[::3] != k[::3]
        or not k[1]
        or q[1] % k[1]
        or chosen[:2] != k[:2]
        or len(starts) != k[0]
        or not all(scale == k[:3] for scale in scales)
    ):
        raise ShapeError(
            f"sparse_attention: {_list(layouts)} and {len(starts)} starts do not belong together"
        )
    tokens, size, keys, units = *q[2:], k[2], chosen[2]
    if units not in (tokens, -(-tokens // BLOCK)):
        raise ShapeError(f"{units} units fit neither {tokens} tokens nor their blocks of {BLOCK}")
    if units != tokens and any(start % BLOCK for start in starts):
        raise ShapeError(f"units of {BLOCK} tokens start at multiples of it, not at {list(starts)}")
    if starts and (min(starts) < 0 or max(starts) + tokens > keys):
        raise ShapeError(f"{tokens} queries from {list(starts)} on are not all within {keys} keys")
    if not size:
        raise ShapeError("sparse_attention: heads of no size")


def _check_choice(
    layouts: tuple[Layout, ...],
    counts: tuple[tuple[int, ...], ...],
    starts: tuple[int, ...],
    unit: int,
) -> None:
    shapes = [tuple(item[2]) for item in layouts]
    if (
        not all(item[:2] == (torch.float32, True) for item in layouts)
        or [len(shape) for shape in shapes] != [4, 3, 1, 4, 4, 4]
        or not _is_choice(shapes, unit)
        or not len(starts) == len(counts) == shapes[0][0]
        or any(len(row) != -(-shapes[0][1] // unit) for row in counts)
    ):
        raise ShapeError(
            f"choose_blocks: {_list(layouts)}, {len(starts)} starts and counts of "
            f"{[len(row) for row in counts]} units of {unit} do not belong together"
        )
    if any(start < 0 or start % unit for start in starts):
        raise ShapeError(f"units of {unit} tokens start at multiples of it, not at {list(starts)}")


def _check_exact(
    layouts: tuple[Layout, ...], counts: tuple[tuple[int, ...], ...], starts: tuple[int, ...]
) -> None:
    kinds = [item[:2] for item in layouts]
    q, k, marked, chosen, *scale = [item[2] for item in layouts]
    if (
        kinds not in (_EXACT_FLOAT_KINDS, _EXACT_INT8_KINDS)
        or not len(q) == len(k) == len(chosen) == 4
        or q[::3] != k[::3]
        or not q[3]
        or not k[1]
        or q[1] % k[1]
        or chosen[:2] != k[:2]
        or marked != q[1:2]
        or any(item != k[:3] for item in scale)
        or chosen[2] not in (q[2], -(-q[2] // BLOCK))
        or not len(starts) == len(counts) == k[0]
        or any(len(row) != chosen[2] for row in counts)
        or not _is_packed(layouts[2], 1)
        or not _is_packed(layouts[3], 4)
    ):
        raise ShapeError(
            f"choose_exact: {_list(layouts)}, {len(starts)} starts and counts of "
            f"{[len(row) for row in counts]} units do not belong together"
        )
    unit = 1 if chosen[2] == q[2] else BLOCK
    if any(start < 0 or start % unit or start + q[2] > k[2] for start in starts):
        raise ShapeError(
            f"units of {unit} tokens start at multiples of it, {q[2]} tokens before the end of "
            f"{k[2]} keys, not at {list(starts)}"
        )
    if q[2] % unit:
        raise ShapeError(f"choose_exact: {q[2]} tokens are not whole units of {unit}")


def _is_choice(shapes: list[tuple[int, ...]], unit: int) -> bool:
    """Of queries, weight, norm, both rotary tables and keys."""
    (batch, tokens, heads, size), weight, norm, cos, sin, keys = shapes
    groups = keys[1]
    return (
        unit in (1, BLOCK)
        and size > 0
        and size % 2 == 0
        and groups > 0
        and heads % groups == 0
        and (keys[0], keys[3]) == (batch, size)
        and weight == (groups, heads // groups * size, size)
        and norm == (size,)
        and cos == sin
        and cos in ((1, 1, tokens, size), (batch, 1, tokens, size))
    )


def _list(layouts: tuple[Layout, ...]) -> str:
    return ", ".join(
        f"{dtype} {tuple(shape)}" + ("" if is_cpu else " not on the CPU")
        for dtype, is_cpu, shape, _ in layouts
    )
