"""Native block-sparse attention and the choice of its blocks: the calls of both kernels.

Price: about 10 µs a call over that of the kernel itself.

Shape legend: B rows, T new tokens, S cached tokens, N query heads, K key/value heads, G = N/K, H
head dimension, U units, M chosen blocks, C blocks of keys.
"""

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.native.library import best_isa, is_available, library
from r1ray.ops.native.sparse_plans import (
    Layout,
    Plan,
    layout,
    plan_attention,
    plan_choice,
    plan_exact,
)

__all__ = ["can_attend", "choose_blocks", "choose_exact", "gated_attention", "sparse_attention"]

_NO_MEMORY, _BAD_BLOCK = 1, 2  # what the kernels return where they fail
_WIDTH = 16  # floats of the widest register, to which weights are padded


def _fields(pointers_and_sizes: str) -> list[tuple[str, type]]:
    """`*name` is an address, `name` a size; every kernel's structure ends with two int32."""
    names = pointers_and_sizes.split()
    fields: list[tuple[str, type]] = [
        (name.lstrip("*"), ctypes.c_void_p if name.startswith("*") else ctypes.c_int64)
        for name in names
    ]
    return [*fields, ("isa", ctypes.c_int32), ("num_threads", ctypes.c_int32)]


class _AttentionArguments(ctypes.Structure):
    """As in attention.h."""

    _fields_ = _fields(
        "*q q_row q_head q_token *keys key_row key_head *values value_row value_head"
        " *key_scale key_scale_row key_scale_head *value_scale value_scale_row value_scale_head"
        " *pages pages_row *chosen *starts *out B N K T S H U M unit"
    )


class _ChoiceArguments(ctypes.Structure):
    """As in block_choice.cpp."""

    _fields_ = _fields(
        "*q q_row q_token q_head *weight *norm *cos *sin rotary_row rotary_token"
        " *keys key_row key_head *pages pages_row *counts *starts *out B T N K H C U M unit"
    )


class _ExactArguments(ctypes.Structure):
    """As in exact_choice.h."""

    _fields_ = _fields(
        "*q q_row q_head q_token *keys key_row key_head *key_scale key_scale_row key_scale_head"
        " *pages pages_row *is_marked *counts *starts *out B N K T H U M unit"
    )


class _GatedArguments(ctypes.Structure):
    """As in gated_attention.h."""

    _fields_ = (
        ("choice", _ChoiceArguments),
        ("exact", _ExactArguments),
        ("attention", _AttentionArguments),
    )


_Addresses = ctypes.c_void_p * 13  # as in gated_attention.h


def can_attend(q_BNTH: Tensor, k_BKSH: Tensor) -> bool:
    """Whether `sparse_attention` is there, and takes such queries and keys without a backward."""
    return (
        q_BNTH.dtype == torch.float32
        and q_BNTH.is_cpu
        and k_BKSH.dtype in (torch.float32, torch.int8)
        and not (torch.is_grad_enabled() and (q_BNTH.requires_grad or k_BKSH.requires_grad))
        and is_available()
    )


def sparse_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    chosen_BKUM: Tensor,
    starts: list[int],
    *,
    key_scale_BKS: Tensor | None = None,
    value_scale_BKS: Tensor | None = None,
    isa: int | None = None,
) -> Tensor:
    """As `r1ray.ops.block_sparse.block_sparse_attention`, on the CPU: float32 [B, N, T, H].

    Float keys and values, or units of one token: float32 throughout. INT8 ones in units of a block
    are multiplied in bfloat16 where the processor has it. What a query gets depends on nothing but
    itself and what it keeps: not on other rows, nor on the number of threads.

    Args:
        q_BNTH: float32.
        k_BKSH, v_BKSH: float32; or int8, and their floats are these times the scales. Slices of a
            cache are read where they lie.
        isa: index in `ISA_NAMES`, at most `best_isa()`; None for that one.
    Raises:
        ShapeError: shapes, dtypes or starts do not fit each other, or a block is too late.
    """
    tensors = [q_BNTH, k_BKSH, v_BKSH, chosen_BKUM]
    if key_scale_BKS is not None or value_scale_BKS is not None:
        tensors += [scale for scale in (key_scale_BKS, value_scale_BKS) if scale is not None]
    plan = plan_attention(tuple([layout(item) for item in tensors]), tuple(starts))
    if plan.has_gaps:
        tensors = [item.contiguous() for item in tensors]
        plan = plan_attention(tuple([layout(item) for item in tensors]), tuple(starts))
    batch, heads, _, tokens, _, size = plan.sizes[:6]
    out_BTNH = torch.empty(batch, tokens, heads, size, dtype=torch.float32, device="cpu")
    q, k, v, chosen, *scales = [item.data_ptr() for item in tensors]
    key_scale, value_scale = scales or (None, None)
    strides = plan.strides
    arguments = _AttentionArguments(
        *(q, *strides[0], k, *strides[1], v, *strides[2]),
        *(key_scale, *strides[3], value_scale, *strides[4]),
        *(None, 0, chosen, plan.numbers, out_BTNH.data_ptr(), *plan.sizes),
        *(_known(isa), torch.get_num_threads()),
    )
    _raise(library().r1ray_sparse_attention(ctypes.byref(arguments)), "sparse_attention")
    return out_BTNH.transpose(1, 2)


def choose_blocks(
    q_BTNH: Tensor,
    query_weight: Tensor,
    query_norm: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys_BKCH: Tensor,
    counts_BU: list[list[int]],
    starts: list[int],
    unit: int,
    *,
    isa: int | None = None,
) -> Tensor:
    """`BlockGate.queries` and `scores`, and `block_selection.choose_blocks` of the largest a unit.

    On the CPU, in float32. The numbers of the chosen blocks, -1 behind them: int64 [B, K, U, M].
    Blocks whose scores differ by less than rounding may take each other's place.

    Args:
        q_BTNH: float32, before rotary positions.
        query_weight, query_norm: those of the gate, [K, G·H, H] and [H].
        rotary: tables [B or 1, 1, T, H] at the positions of the queries.
        keys_BKCH: float32 k̂; a slice of a cache is read where it lies.
        counts_BU: `count_chosen` of each unit's block. A unit that takes all it can is not scored.
        starts: positions of each row's first query; multiples of 64 in units of a block.
        unit: tokens of a unit: 64 or 1.
    Raises:
        ShapeError: shapes, dtypes, starts or counts do not fit each other.
    """
    tensors = [q_BTNH, query_weight.detach(), query_norm.detach(), *rotary, keys_BKCH]
    counts = tuple([tuple(row) for row in counts_BU])
    plan = plan_choice(tuple([layout(item) for item in tensors]), counts, tuple(starts), unit)
    if plan.has_gaps:
        tensors = [item.contiguous() for item in tensors]
        plan = plan_choice(tuple([layout(item) for item in tensors]), counts, tuple(starts), unit)
    batch, _, _, groups, size, _, units, most = plan.sizes[:8]
    if size % _WIDTH:
        tensors[1] = F.pad(tensors[1], (0, -size % _WIDTH))
    chosen = torch.empty(batch, groups, units, most, dtype=torch.int64, device="cpu")
    q, weight, norm, cos, sin, keys = [item.data_ptr() for item in tensors]
    strides = plan.strides
    arguments = _ChoiceArguments(
        *(q, *strides[0], weight, norm, cos, sin, *strides[1], keys, *strides[2]),
        *(None, 0, plan.numbers + 8 * batch, plan.numbers, chosen.data_ptr(), *plan.sizes),
        *(_known(isa), torch.get_num_threads()),
    )
    _raise(library().r1ray_choose_blocks(ctypes.byref(arguments)), "choose_blocks")
    return chosen


def choose_exact(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    is_marked_N: Tensor,
    counts_BU: list[list[int]],
    starts: list[int],
    chosen_BKUM: Tensor,
    *,
    key_scale_BKS: Tensor | None = None,
    isa: int | None = None,
) -> None:
    """`r1ray.ops.exact_choice.choose_exact` on the CPU: `chosen_BKUM` is written in place.

    Float keys and single queries are multiplied in float32. Other queries are rounded to int8 where
    keys are and the processor has such products, which moves a score by up to 1/254 of the largest
    element of the query times the sum of the key's: blocks of about equal worth may take each
    other's place.

    Args:
        q_BNTH: float32, with rotary positions.
        k_BKSH: float32; or int8, and their floats are these times the scales.
        is_marked_N: bool.
        counts_BU: blocks that each unit keeps in groups with a marked head.
        chosen_BKUM: contiguous int64. Units have one token where U = T; else 64, and then every
            start is a multiple of 64, and T is one.
    Raises:
        ShapeError: shapes, dtypes, starts or counts do not fit each other.
    """
    tensors = [q_BNTH, k_BKSH, is_marked_N, chosen_BKUM]
    if key_scale_BKS is not None:
        tensors.append(key_scale_BKS)
    counts = tuple([tuple(row) for row in counts_BU])
    plan = plan_exact(tuple([layout(item) for item in tensors]), counts, tuple(starts))
    if plan.has_gaps:
        tensors = [item.contiguous() for item in tensors]
        plan = plan_exact(tuple([layout(item) for item in tensors]), counts, tuple(starts))
    q, k, is_marked, chosen, *scale = [item.data_ptr() for item in tensors]
    strides = plan.strides
    arguments = _ExactArguments(
        *(q, *strides[0], k, *strides[1], scale[0] if scale else None, *strides[2]),
        *(None, 0, is_marked, plan.numbers + 8 * len(starts), plan.numbers, chosen, *plan.sizes),
        *(_known(isa), torch.get_num_threads()),
    )
    _raise(library().r1ray_choose_exact(ctypes.byref(arguments)), "choose_exact")


def gated_attention(
    weights: tuple[Tensor, Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    summaries_BKCH: Tensor,
    states: Sequence[Tensor],
    counts: tuple[list[list[int]], list[list[int]]],
    starts: list[int],
    unit: int,
    *,
    isa: int | None = None,
) -> Tensor:
    """`choose_blocks`, `choose_exact` and `sparse_attention` in one call: float32 [B, N, T, H].

    Args:
        weights: those of the gate [K, G·H, H] and [H], and its marked heads, bool [N].
        queries: float32 [B, T, N, H] before rotary positions, and [B, N, T, H] with them.
        states: keys and values [B, K, S, H]; behind int8 ones their scales [B, K, S].
        counts: blocks that each unit keeps; in groups with a marked head.
    Raises:
        ShapeError: shapes, dtypes, starts or counts do not fit each other.
    """
    weight, norm, is_marked = weights
    tensors = [queries[0], weight, norm, *rotary, summaries_BKCH, queries[1], is_marked, *states]
    numbers = tuple([tuple(row) for row in counts[0]]), tuple([tuple(row) for row in counts[1]])
    fixed = (*numbers, tuple(starts), unit, _known(isa), torch.get_num_threads())
    plan = _plan_gated(tuple([layout(item) for item in tensors]), *fixed)
    if plan.has_gaps:
        tensors = [item.contiguous() for item in tensors]
        plan = _plan_gated(tuple([layout(item) for item in tensors]), *fixed)
    batch, heads, tokens, size = queries[1].shape
    if size % _WIDTH:
        tensors[1] = F.pad(weight.detach(), (0, -size % _WIDTH))
    out_BTNH = torch.empty(batch, tokens, heads, size, dtype=torch.float32, device="cpu")
    no_scales = () if len(states) > 2 else (None, None)
    addresses = [*[item.data_ptr() for item in tensors], *no_scales, out_BTNH.data_ptr()]
    failure = library().r1ray_gated_attention(plan.arguments, _Addresses(*addresses))
    _raise(failure, "gated_attention")
    return out_BTNH.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _GatedPlan:
    """As `Plan`, of three kernels; `arguments` point into the arrays of `parts`."""

    has_gaps: bool
    arguments: Any
    parts: tuple[Plan, Plan, Plan]


@functools.lru_cache(maxsize=64)
def _plan_gated(
    layouts: tuple[Layout, ...],
    counts: tuple[tuple[int, ...], ...],
    exact_counts: tuple[tuple[int, ...], ...],
    starts: tuple[int, ...],
    unit: int,
    isa: int,
    num_threads: int,
) -> _GatedPlan:
    rotated, marks, k, v, *scales = layouts[6:]
    choice = plan_choice(layouts[:6], counts, starts, unit)
    shape = (*k[2][:2], choice.sizes[6], max(map(max, exact_counts), default=0))
    strides = tuple([math.prod(shape[at + 1 :]) for at in range(4)])
    chosen = torch.int64, True, shape, strides
    exact = plan_exact((rotated, k, marks, chosen, *scales[:1]), exact_counts, starts)
    attention = plan_attention((rotated, k, v, chosen, *scales), starts)
    batch, tokens, heads, groups, size, _, units = choice.sizes[:7]
    if exact.sizes[:6] != (batch, heads, groups, tokens, size, units):
        raise ShapeError(
            f"gated_attention: summaries of {groups} groups and keys {tuple(k[2])} do not belong "
            f"together"
        )
    threads = isa, num_threads
    q, rotary, keys = choice.strides
    arguments = _GatedArguments(
        _ChoiceArguments(
            *(None, *q, None, None, None, None, *rotary, None, *keys, None, 0),
            *(choice.numbers + 8 * len(starts), choice.numbers, None, *choice.sizes, *threads),
        ),
        _ExactArguments(
            *(None, *exact.strides[0], None, *exact.strides[1], None, *exact.strides[2], None, 0),
            *(None, exact.numbers + 8 * len(starts), exact.numbers, None, *exact.sizes, *threads),
        ),
        _AttentionArguments(
            *itertools.chain.from_iterable((None, *each) for each in attention.strides),
            *(None, 0, None, attention.numbers, None, *attention.sizes, *threads),
        ),
    )
    parts = choice, exact, attention
    return _GatedPlan(any(part.has_gaps for part in parts), ctypes.byref(arguments), parts)


def _known(isa: int | None) -> int:
    best = best_isa()
    return best if isa is None else min(isa, best)


def _raise(failure: int, name: str) -> None:
    if failure == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the tiles of a thread")
    if failure == _BAD_BLOCK:
        raise ShapeError(f"{name}: a block is not among those before the one before its unit's own")
