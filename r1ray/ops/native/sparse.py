"""Native block-sparse attention and the choice of its blocks: checks, and calls of both kernels.

The kernels take addresses and strides: what does not fit would be read beyond its end, so that all
of it is checked here, and the numbers of blocks are by the kernel.

Shape legend: B rows, T new tokens, S cached tokens, N query heads, K key/value heads, G = N/K, H
head dimension, U units, M chosen blocks, C blocks of keys.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.block_sparse import BLOCK
from r1ray.ops.native.library import best_isa, library

__all__ = ["choose_blocks", "sparse_attention"]

_NO_MEMORY, _BAD_BLOCK = 1, 2  # what the kernels return where they fail
_FLOAT_KINDS = [(torch.float32, True)] * 3 + [(torch.int64, True)]
_INT8_KINDS = [
    *((torch.float32, True), (torch.int8, True), (torch.int8, True), (torch.int64, True)),
    *((torch.float32, True), (torch.float32, True)),
]  # of the queries, keys, values, blocks and scales: dtype, and whether on the CPU
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
        " *chosen *starts *out B N K T S H U M unit"
    )


class _ChoiceArguments(ctypes.Structure):
    """As in block_choice.cpp."""

    _fields_ = _fields(
        "*q q_row q_token q_head *weight *norm *cos *sin rotary_row rotary_token"
        " *keys key_row key_head *counts *starts *out B T N K H C U M unit"
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
    are multiplied in bfloat16 where the processor has it.

    Args:
        q_BNTH: float32.
        k_BKSH, v_BKSH: float32; or int8, and their floats are these times the scales. Slices of a
            cache are read where they lie.
        isa: index in `ISA_NAMES`, at most `best_isa()`; None for that one.
    Raises:
        ShapeError: shapes, dtypes or starts do not fit each other, or a block is too late.
    """
    q_BNTH, k_BKSH, v_BKSH = _rows(q_BNTH, 1), _rows(k_BKSH, 2), _rows(v_BKSH, 2)
    scales = [
        None if scale is None else _rows(scale, 1) for scale in (key_scale_BKS, value_scale_BKS)
    ]
    chosen_BKUM = chosen_BKUM.contiguous()
    _check_attention(q_BNTH, k_BKSH, v_BKSH, chosen_BKUM, starts, scales)
    (batch, heads, tokens, size), (_, groups, keys, _) = q_BNTH.shape, k_BKSH.shape
    units, most = chosen_BKUM.shape[2:]
    first = _longs(starts)
    out_BTNH = torch.empty(batch, tokens, heads, size, dtype=torch.float32, device="cpu")
    arguments = _AttentionArguments(
        *(q_BNTH.data_ptr(), *q_BNTH.stride()[:3]),
        *(k_BKSH.data_ptr(), *k_BKSH.stride()[:2]),
        *(v_BKSH.data_ptr(), *v_BKSH.stride()[:2]),
        *_scale_fields(scales[0]),
        *_scale_fields(scales[1]),
        *(chosen_BKUM.data_ptr(), ctypes.addressof(first), out_BTNH.data_ptr()),
        *(batch, heads, groups, tokens, keys, size, units, most),
        *(1 if units == tokens else BLOCK, _known(isa), torch.get_num_threads()),
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
    q_BTNH, keys_BKCH = _rows(q_BTNH, 1), _rows(keys_BKCH, 2)
    weight, norm = query_weight.detach().contiguous(), query_norm.detach().contiguous()
    cos, sin = (_rows(table, 1) for table in rotary)
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    _check_choice(q_BTNH, weight, norm, (cos, sin), keys_BKCH, counts_BU, starts, unit)
    (batch, tokens, heads, size), (_, groups, blocks, _) = q_BTNH.shape, keys_BKCH.shape
    if size % _WIDTH:
        weight = F.pad(weight, (0, -size % _WIDTH))
    units = -(-tokens // unit)
    most = max((max(row, default=0) for row in counts_BU), default=0)
    first, counts = _longs(starts), _longs([count for row in counts_BU for count in row])
    chosen = torch.empty(batch, groups, units, most, dtype=torch.int64, device="cpu")
    arguments = _ChoiceArguments(
        *(q_BTNH.data_ptr(), *q_BTNH.stride()[:3], weight.data_ptr(), norm.data_ptr()),
        *(cos.data_ptr(), sin.data_ptr(), cos.stride(0) if len(cos) > 1 else 0, cos.stride(2)),
        *(keys_BKCH.data_ptr(), *keys_BKCH.stride()[:2]),
        *(ctypes.addressof(counts), ctypes.addressof(first)),
        *(chosen.data_ptr(), batch, tokens, heads, groups, size, blocks, units, most),
        *(unit, _known(isa), torch.get_num_threads()),
    )
    _raise(library().r1ray_choose_blocks(ctypes.byref(arguments)), "choose_blocks")
    return chosen


def _rows(x: Tensor, dims: int) -> Tensor:
    """`x` itself where its last one or two dimensions are contiguous, else a copy."""
    strides = x.stride()
    if strides[-1:] == (1,) and (dims == 1 or strides[-2:-1] == x.shape[-1:]):
        return x
    return x.contiguous()


def _longs(values: list[int]) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(values))(*values)


def _scale_fields(scale: Tensor | None) -> tuple[int | None, int, int]:
    return (None, 0, 0) if scale is None else (scale.data_ptr(), scale.stride(0), scale.stride(1))


def _known(isa: int | None) -> int:
    best = best_isa()
    return best if isa is None else min(isa, best)


def _raise(failure: int, name: str) -> None:
    if failure == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the tiles of a thread")
    if failure == _BAD_BLOCK:
        raise ShapeError(f"{name}: a block is not among those before the one before its unit's own")


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    starts: list[int],
    scales: list[Tensor | None],
) -> None:
    tensors = [q, k, v, chosen, *(scale for scale in scales if scale is not None)]
    kinds = [(item.dtype, item.is_cpu) for item in tensors]
    q_shape, k_shape, chosen_shape = tuple(q.shape), tuple(k.shape), tuple(chosen.shape)
    if (
        kinds not in (_FLOAT_KINDS, _INT8_KINDS)
        or not len(q_shape) == len(k_shape) == len(chosen_shape) == 4
        or v.shape != k_shape
        or q_shape[::3] != k_shape[::3]
        or not k_shape[1]
        or q_shape[1] % k_shape[1]
        or chosen_shape[:2] != k_shape[:2]
        or len(starts) != k_shape[0]
        or not all(scale.shape == k_shape[:3] for scale in tensors[4:])
    ):
        raise ShapeError(
            f"sparse_attention: {_list(tensors)} and {len(starts)} starts do not belong together"
        )
    tokens, size, keys, units = *q_shape[2:], k_shape[2], chosen_shape[2]
    if units not in (tokens, -(-tokens // BLOCK)):
        raise ShapeError(f"{units} units fit neither {tokens} tokens nor their blocks of {BLOCK}")
    if units != tokens and any(start % BLOCK for start in starts):
        raise ShapeError(f"units of {BLOCK} tokens start at multiples of it, not at {starts}")
    if starts and (min(starts) < 0 or max(starts) + tokens > keys):
        raise ShapeError(f"{tokens} queries from {starts} on are not all within {keys} keys")
    if not size:
        raise ShapeError("sparse_attention: heads of no size")


def _check_choice(
    q: Tensor,
    weight: Tensor,
    norm: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    counts: list[list[int]],
    starts: list[int],
    unit: int,
) -> None:
    tensors = [q, weight, norm, *rotary, keys]
    shapes = [tuple(item.shape) for item in tensors]
    if (
        not all(item.dtype is torch.float32 and item.is_cpu for item in tensors)
        or [len(shape) for shape in shapes] != [4, 3, 1, 4, 4, 4]
        or not _is_choice(shapes, unit)
        or not len(starts) == len(counts) == len(q)
        or any(len(row) != -(-shapes[0][1] // unit) for row in counts)
    ):
        raise ShapeError(
            f"choose_blocks: {_list(tensors)}, {len(starts)} starts and counts of "
            f"{[len(row) for row in counts]} units of {unit} do not belong together"
        )
    if any(start < 0 or start % unit for start in starts):
        raise ShapeError(f"units of {unit} tokens start at multiples of it, not at {starts}")


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


def _list(tensors: list[Tensor]) -> str:
    return ", ".join(f"{item.dtype} {tuple(item.shape)} on {item.device}" for item in tensors)
