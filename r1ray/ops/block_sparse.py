"""Causal attention over few, chosen blocks of keys: exact softmax over what is kept.

Keys come in blocks of 64 tokens, anchored to absolute positions. Queries come in units: of a
block where a prompt is read, of one token where an answer is written. A query sees its own block
up to itself, the block before, and what was chosen for its unit.

1. A unit's own block is a small causal attention, batched over all units.
2. The block before and the chosen ones are earlier than every query of the unit: they are gathered
   and attended without a mask, the queries of a group folded into one. Units of equal number of
   blocks go together, a few at a time.
3. Both are merged by their log-sum-exps.

On CUDA, units of a block are one FlexAttention call, whose block mask the numbers make. On a CPU,
the native kernels do all of it where they were built; torch is their oracle.

Price: 4·64·(M + 2)·N·H FLOP a token and layer, M blocks chosen; memory for the keys and values that
a few units gather, whatever the length.

Shape legend: B rows, T new tokens, S cached tokens, N query heads, K key/value heads, G = N/K heads
of a group, H head dimension, U units, M chosen blocks, L tokens that one unit gathers.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from r1ray.errors import ShapeError
from r1ray.ops import native
from r1ray.ops.block_selection import BLOCK, split_tokens
from r1ray.ops.cached_states import CachedStates
from r1ray.ops.causal_attention import flash_attention, merge_attention
from r1ray.ops.packed_attention import compiled_flex_attention

__all__ = ["block_sparse_attention", "build_block_mask", "reference_attention"]

_UNITS_TOGETHER = 8


def block_sparse_attention(
    q_BNTH: Tensor, k: CachedStates, v: CachedStates, chosen_BKUM: Tensor, starts: list[int]
) -> Tensor:
    """softmax(q·kᵀ/√H)·v over the keys that a query keeps: [B, N, T, H].

    Args:
        q_BNTH: the queries of row b are at positions starts[b], starts[b] + 1, ...
        k, v: [B, K, S, H], at positions 0 to S - 1, of which those up to each query count.
        chosen_BKUM: int64 numbers of blocks, earlier than the one before the unit's, each at most
            once; -1 for none, at the end. Units have one token each where U = T, else 64, and then
            every start is a multiple of 64.
        starts: B positions.
    Raises:
        ShapeError: the shapes, or starts and units, do not fit each other.
    """
    if native.can_attend(q_BNTH, k.data_BKSH):
        return native.sparse_attention(
            *(q_BNTH, k.data_BKSH, v.data_BKSH, chosen_BKUM, starts),
            key_scale_BKS=k.scale_BKS,
            value_scale_BKS=v.scale_BKS,
        )
    _check(q_BNTH, k.shape, chosen_BKUM, starts)
    if chosen_BKUM.shape[2] == q_BNTH.shape[2]:
        return _attend_tokens(q_BNTH, k, v, chosen_BKUM, starts)
    attend = _attend_flex if q_BNTH.is_cuda else _attend_groups
    rows = [
        attend(q_BNTH[b], k.row(b), v.row(b), chosen_BKUM[b], start // BLOCK)
        for b, start in enumerate(starts)
    ]
    return torch.stack(rows)


def reference_attention(
    q_BNTH: Tensor, k: CachedStates, v: CachedStates, chosen_BKUM: Tensor, starts: list[int]
) -> Tensor:
    """As `block_sparse_attention`, by a mask over all keys: its oracle."""
    _check(q_BNTH, k.shape, chosen_BKUM, starts)
    groups = q_BNTH.shape[1] // k.shape[1]
    kept_BKTS = _kept(chosen_BKUM, starts, q_BNTH.shape[2], k.shape[2])
    mask_BNTS = kept_BKTS.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q_BNTH,
        k.floats().to(q_BNTH.dtype).repeat_interleave(groups, dim=1),
        v.floats().to(q_BNTH.dtype).repeat_interleave(groups, dim=1),
        attn_mask=mask_BNTS,
    )


def _kept(chosen_BKUM: Tensor, starts: list[int], tokens: int, keys: int) -> Tensor:
    """Which keys each query sees: bool [B, K, T, S]."""
    device = chosen_BKUM.device
    unit_tokens = 1 if chosen_BKUM.shape[2] == tokens else BLOCK
    positions_BT = _positions(starts, tokens, device)
    units_T = torch.arange(tokens, device=device) // unit_tokens
    blocks_S = torch.arange(keys, device=device) // BLOCK
    own_BT1 = (positions_BT // BLOCK)[:, :, None]
    is_local_BTS = (blocks_S >= own_BT1 - 1) & (
        torch.arange(keys, device=device) <= positions_BT[:, :, None]
    )
    is_chosen_BKUS = (chosen_BKUM[..., None] == blocks_S).any(dim=3)
    return is_chosen_BKUS[:, :, units_T] | is_local_BTS[:, None]


def _attend_groups(
    q_NTH: Tensor, k: CachedStates, v: CachedStates, chosen_KUM: Tensor, first: int
) -> Tensor:
    """Groups that keep equally many blocks together, else each by itself."""
    counts_KU = (chosen_KUM >= 0).sum(2)
    if bool((counts_KU == counts_KU[:1]).all()):
        return _attend_row(q_NTH, k, v, chosen_KUM, first)
    parts = [
        _attend_row(q_GTH, k.group(group), v.group(group), chosen_KUM[group : group + 1], first)
        for group, q_GTH in enumerate(q_NTH.chunk(len(chosen_KUM)))
    ]
    return torch.cat(parts)


def _attend_row(
    q_NTH: Tensor, k: CachedStates, v: CachedStates, chosen_KUM: Tensor, first: int
) -> Tensor:
    """One row in units of a block; `first` is the block of its first query."""
    heads, tokens, head_dim = q_NTH.shape
    kv_heads, units, dtype = k.shape[1], chosen_KUM.shape[1], q_NTH.dtype
    padding = units * BLOCK - tokens
    q_UNBH = _in_units(F.pad(q_NTH, (0, 0, 0, padding)))
    own = (0, slice(None), slice(first * BLOCK, first * BLOCK + tokens))
    own_states = (_in_units(F.pad(x[own].to(dtype), (0, 0, 0, padding))) for x in (k, v))
    groups = heads // kv_heads
    out_UNBH, lse_UNB = flash_attention(
        q_UNBH, *(x.repeat_interleave(groups, dim=1) for x in own_states), is_causal=True
    )
    q_UKLH = q_UNBH.reshape(units, kv_heads, groups * BLOCK, head_dim)
    k_blocks, v_blocks = k.in_blocks(BLOCK), v.in_blocks(BLOCK)
    kv_index = torch.arange(kv_heads, device=q_NTH.device)[None, :, None]
    for span, blocks_UKM in _gathers(chosen_KUM, first):
        far_states = (
            x[0, kv_index, blocks_UKM].flatten(2, 3).to(dtype) for x in (k_blocks, v_blocks)
        )
        far_UKLH, far_lse_UKL = flash_attention(q_UKLH[span], *far_states, is_causal=False)
        shape = out_UNBH[span].shape
        out_UNBH[span] = merge_attention(
            (out_UNBH[span], lse_UNB[span]),
            (far_UKLH.reshape(shape), far_lse_UKL.reshape(shape[:-1])),
        )
    return out_UNBH.transpose(0, 1).reshape(heads, units * BLOCK, head_dim)[:, :tokens]


def _attend_flex(
    q_NTH: Tensor, k: CachedStates, v: CachedStates, chosen_KUM: Tensor, first: int
) -> Tensor:
    """As `_attend_row`, in one kernel."""
    groups, dtype = q_NTH.shape[0] // k.shape[1], q_NTH.dtype
    mask = build_block_mask(chosen_KUM, first, (q_NTH.shape[1], k.shape[2]), groups)
    out = compiled_flex_attention()(
        q_NTH[None],
        k.floats().to(dtype),
        v.floats().to(dtype),
        block_mask=mask,
        enable_gqa=True,
        kernel_options={"BLOCK_M": BLOCK, "BLOCK_N": BLOCK},
    )
    return out[0]


def build_block_mask(
    chosen_KUM: Tensor, first: int, lengths: tuple[int, int], groups: int
) -> BlockMask:
    """FlexAttention's mask of one row in units of a block: the own block in part, others whole.

    Args:
        first: block of the first query.
        lengths: of queries and of keys.
    """
    kv_heads, units, _ = chosen_KUM.shape
    own_U = first + torch.arange(units, device=chosen_KUM.device)
    before_KU1 = (own_U - 1)[None, :, None].expand(kv_heads, units, 1)
    whole_KUM = torch.cat([before_KU1, chosen_KUM], dim=2)  # no block before: none chosen either
    start = own_U[0] * BLOCK

    def may_attend(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + start >= key

    def for_heads(x_KU_: Tensor) -> Tensor:
        return x_KU_.repeat_interleave(groups, dim=0)[None].to(torch.int32)

    return BlockMask.from_kv_blocks(
        for_heads(torch.ones_like(before_KU1[..., 0])),
        # As wide as the others: the kernel finds both by one stride. The first alone counts.
        for_heads(own_U[None, :, None].expand_as(whole_KUM)),
        for_heads((whole_KUM >= 0).sum(2)),
        for_heads(whole_KUM.clamp_min(0)),
        BLOCK_SIZE=BLOCK,
        mask_mod=may_attend,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )


def _gathers(chosen_KUM: Tensor, first: int) -> Iterator[tuple[slice, Tensor]]:
    """Spans of units that gather equally many blocks, and these: [U', K, M + 1]."""
    units = chosen_KUM.shape[1]
    counts = (chosen_KUM[0] >= 0).sum(-1).tolist()
    before = torch.arange(first - 1, first - 1 + units, device=chosen_KUM.device)
    start = 1 if first == 0 else 0  # the first block of all has none before it
    while start < units:
        stop = start + 1
        while stop < min(units, start + _UNITS_TOGETHER) and counts[stop] == counts[start]:
            stop += 1
        blocks = chosen_KUM[:, start:stop, : counts[start]]
        last = before[None, start:stop, None].expand(len(blocks), -1, 1)
        yield slice(start, stop), torch.cat([blocks, last], dim=2).transpose(0, 1)
        start = stop


def _in_units(x_XTH: Tensor) -> Tensor:
    """[X, U·64, H] -> [U, X, 64, H]."""
    return x_XTH.unflatten(1, (-1, BLOCK)).transpose(0, 1)


def _attend_tokens(
    q_BNTH: Tensor, k: CachedStates, v: CachedStates, chosen_BKTM: Tensor, starts: list[int]
) -> Tensor:
    """Every query has chosen for itself; a few at a time, as each gathers its own keys."""
    out = [
        _attend_few(q, k, v, chosen, [start + part.start for start in starts])
        for part, q, chosen in split_tokens(q_BNTH, chosen_BKTM)
    ]
    return torch.cat(out, dim=2) if out else torch.empty_like(q_BNTH)


def _attend_few(
    q_BNTH: Tensor, k: CachedStates, v: CachedStates, chosen_BKTM: Tensor, starts: list[int]
) -> Tensor:
    batch, heads, tokens, head_dim = q_BNTH.shape
    kv_heads, device, dtype = k.shape[1], q_BNTH.device, q_BNTH.dtype
    positions_BT = _positions(starts, tokens, device)
    own_BKT1 = (positions_BT // BLOCK)[:, None, :, None].expand(batch, kv_heads, tokens, 1)
    blocks_BKTM = torch.cat([chosen_BKTM, own_BKT1 - 1, own_BKT1], dim=3)
    offsets = torch.arange(BLOCK, device=device)
    slots_BKTL = (blocks_BKTM[..., None] * BLOCK + offsets).flatten(3)
    is_kept_BKTL = (blocks_BKTM >= 0)[..., None].expand(*blocks_BKTM.shape, BLOCK).flatten(3)
    is_kept_BKTL = is_kept_BKTL & (slots_BKTL <= positions_BT[:, None, :, None])
    slots_BKTL = slots_BKTL.clamp(0, k.shape[2] - 1)
    rows = torch.arange(batch, device=device)[:, None, None, None]
    kv_index = torch.arange(kv_heads, device=device)[None, :, None, None]
    out = F.scaled_dot_product_attention(
        q_BNTH.unflatten(1, (kv_heads, -1)).transpose(2, 3),  # [B, K, T, G, H]
        k[rows, kv_index, slots_BKTL].to(dtype),
        v[rows, kv_index, slots_BKTL].to(dtype),
        attn_mask=is_kept_BKTL[..., None, :],
    )
    return out.transpose(2, 3).reshape(batch, heads, tokens, head_dim)


def _positions(starts: list[int], tokens: int, device: torch.device) -> Tensor:
    """Of every query: int64 [B, T]."""
    return torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)


def _check(q_BNTH: Tensor, kv_shape: torch.Size, chosen_BKUM: Tensor, starts: list[int]) -> None:
    batch, heads, tokens, _ = q_BNTH.shape
    kv_batch, kv_heads, keys, _ = kv_shape
    units = chosen_BKUM.shape[2]
    if kv_batch != batch or len(starts) != batch or chosen_BKUM.shape[:2] != (batch, kv_heads):
        raise ShapeError(
            f"block_sparse_attention: queries {tuple(q_BNTH.shape)}, keys {tuple(kv_shape)}, "
            f"blocks {tuple(chosen_BKUM.shape)} and {len(starts)} starts are not of the same rows"
        )
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads do not divide into {kv_heads} groups")
    if units not in (tokens, -(-tokens // BLOCK)):
        raise ShapeError(
            f"{units} units fit neither {tokens} tokens nor their {-(-tokens // BLOCK)} blocks"
        )
    if units != tokens and any(start % BLOCK for start in starts):
        raise ShapeError(f"units of {BLOCK} tokens start at multiples of it, not at {starts}")
    if max(starts, default=0) + tokens > keys:
        raise ShapeError(f"{tokens} queries from {max(starts)} on see past the {keys} keys")
