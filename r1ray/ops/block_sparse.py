"""Causal attention over few, chosen blocks of keys: exact softmax over what is kept.

Keys come in blocks of 64 tokens, anchored to absolute positions. Queries come in units: of a
block where a prompt is read, of one token where an answer is written. A query sees its own block
up to itself, the block before, and what was chosen for its unit.

1. A unit's own block is a small causal attention, batched over all units.
2. The block before and the chosen ones are earlier than every query of the unit: they are gathered
   and attended without a mask, the queries of a group folded into one. Units of equal number of
   blocks go together, a few at a time.
3. Both are merged by their log-sum-exps.

Price: 4·64·(M + 2)·N·H FLOP a token and layer, M blocks chosen; memory for the keys and values that
a few units gather, whatever the length.

Shape legend: B rows, T new tokens, S cached tokens, N query heads, K key/value heads, G = N/K heads
of a group, H head dimension, U units, M chosen blocks, L tokens that one unit gathers.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.errors import ShapeError

__all__ = ["BLOCK", "block_sparse_attention", "reference_attention"]

BLOCK = 64
_UNITS_TOGETHER = 8


def block_sparse_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, chosen_BKUM: Tensor, starts: list[int]
) -> Tensor:
    """softmax(q·kᵀ/√H)·v over the keys that a query keeps: [B, N, T, H].

    Args:
        q_BNTH: the queries of row b are at positions starts[b], starts[b] + 1, ...
        k_BKSH, v_BKSH: at positions 0 to S - 1, of which those up to each query count.
        chosen_BKUM: int64 numbers of blocks, earlier than the one before the unit's, each at most
            once; -1 for none, at the end. Units have one token each where U = T, else 64, and then
            every start is a multiple of 64. One unit has the same number of blocks in every group
            of its row.
        starts: B positions.
    Raises:
        ShapeError: the shapes, or starts and units, do not fit each other.
    """
    _check(q_BNTH, k_BKSH, chosen_BKUM, starts)
    if chosen_BKUM.shape[2] == q_BNTH.shape[2]:
        return _attend_tokens(q_BNTH, k_BKSH, v_BKSH, chosen_BKUM, starts)
    rows = [
        _attend_row(q_BNTH[b], k_BKSH[b], v_BKSH[b], chosen_BKUM[b], start // BLOCK)
        for b, start in enumerate(starts)
    ]
    return torch.stack(rows)


def reference_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, chosen_BKUM: Tensor, starts: list[int]
) -> Tensor:
    """As `block_sparse_attention`, by a mask over all keys: its oracle."""
    _check(q_BNTH, k_BKSH, chosen_BKUM, starts)
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    kept_BKTS = _kept(chosen_BKUM, starts, q_BNTH.shape[2], k_BKSH.shape[2])
    mask_BNTS = kept_BKTS.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q_BNTH,
        k_BKSH.repeat_interleave(groups, dim=1),
        v_BKSH.repeat_interleave(groups, dim=1),
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


def _attend_row(
    q_NTH: Tensor, k_KSH: Tensor, v_KSH: Tensor, chosen_KUM: Tensor, first: int
) -> Tensor:
    """One row in units of a block; `first` is the block of its first query."""
    heads, tokens, head_dim = q_NTH.shape
    kv_heads, units = k_KSH.shape[0], chosen_KUM.shape[1]
    padding = units * BLOCK - tokens
    q_UNBH = _in_units(F.pad(q_NTH, (0, 0, 0, padding)))
    own = slice(first * BLOCK, first * BLOCK + tokens)
    k_UKBH = _in_units(F.pad(k_KSH[:, own], (0, 0, 0, padding)))
    v_UKBH = _in_units(F.pad(v_KSH[:, own], (0, 0, 0, padding)))
    groups = heads // kv_heads
    out_UNBH, lse_UNB = _flash(
        q_UNBH,
        k_UKBH.repeat_interleave(groups, dim=1),
        v_UKBH.repeat_interleave(groups, dim=1),
        is_causal=True,
    )
    q_UKLH = q_UNBH.reshape(units, kv_heads, groups * BLOCK, head_dim)
    whole = k_KSH.shape[1] // BLOCK
    k_KCBH = k_KSH[:, : whole * BLOCK].view(kv_heads, whole, BLOCK, head_dim)
    v_KCBH = v_KSH[:, : whole * BLOCK].view(kv_heads, whole, BLOCK, head_dim)
    kv_index = torch.arange(kv_heads, device=q_NTH.device)[None, :, None]
    for span, blocks_UKM in _gathers(chosen_KUM, first):
        k_UKLH = k_KCBH[kv_index, blocks_UKM].flatten(2, 3)
        v_UKLH = v_KCBH[kv_index, blocks_UKM].flatten(2, 3)
        far_UKLH, far_lse_UKL = _flash(q_UKLH[span], k_UKLH, v_UKLH, is_causal=False)
        shape = out_UNBH[span].shape
        merged = _merge(
            (out_UNBH[span], lse_UNB[span]),
            (far_UKLH.reshape(shape), far_lse_UKL.reshape(shape[:-1])),
        )
        out_UNBH[span] = merged
    return out_UNBH.transpose(0, 1).reshape(heads, units * BLOCK, head_dim)[:, :tokens]


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


def _flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's flash attention of one dtype, and the log-sum-exps of its rows."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.contiguous(), k.contiguous(), v.contiguous(), 0.0, is_causal
        )
        return out, lse
    scores = torch.matmul(q.float() / math.sqrt(q.shape[-1]), k.float().transpose(-1, -2))
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp().to(v.dtype), v), lse


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys from that over each, by their log-sum-exps."""
    share = torch.sigmoid(one[1] - other[1])[..., None].to(one[0].dtype)
    return torch.lerp(other[0], one[0], share)


def _attend_tokens(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, chosen_BKUM: Tensor, starts: list[int]
) -> Tensor:
    """Every query gathers its own keys: for the few tokens of a decode step."""
    batch, heads, tokens, head_dim = q_BNTH.shape
    kv_heads, device = k_BKSH.shape[1], q_BNTH.device
    positions_BT = _positions(starts, tokens, device)
    own_BKT1 = (positions_BT // BLOCK)[:, None, :, None].expand(batch, kv_heads, tokens, 1)
    blocks_BKTM = torch.cat([chosen_BKUM, own_BKT1 - 1, own_BKT1], dim=3)
    offsets = torch.arange(BLOCK, device=device)
    slots_BKTL = (blocks_BKTM[..., None] * BLOCK + offsets).flatten(3)
    is_kept_BKTL = (blocks_BKTM >= 0)[..., None].expand(*blocks_BKTM.shape, BLOCK).flatten(3)
    is_kept_BKTL = is_kept_BKTL & (slots_BKTL <= positions_BT[:, None, :, None])
    slots_BKTL = slots_BKTL.clamp(0, k_BKSH.shape[2] - 1)
    rows = torch.arange(batch, device=device)[:, None, None, None]
    kv_index = torch.arange(kv_heads, device=device)[None, :, None, None]
    out = F.scaled_dot_product_attention(
        q_BNTH.unflatten(1, (kv_heads, -1)).transpose(2, 3),  # [B, K, T, G, H]
        k_BKSH[rows, kv_index, slots_BKTL],
        v_BKSH[rows, kv_index, slots_BKTL],
        attn_mask=is_kept_BKTL[..., None, :],
    )
    return out.transpose(2, 3).reshape(batch, heads, tokens, head_dim)


def _positions(starts: list[int], tokens: int, device: torch.device) -> Tensor:
    """Of every query: int64 [B, T]."""
    return torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)


def _check(q_BNTH: Tensor, k_BKSH: Tensor, chosen_BKUM: Tensor, starts: list[int]) -> None:
    batch, heads, tokens, _ = q_BNTH.shape
    kv_batch, kv_heads, keys, _ = k_BKSH.shape
    units = chosen_BKUM.shape[2]
    if kv_batch != batch or len(starts) != batch or chosen_BKUM.shape[:2] != (batch, kv_heads):
        raise ShapeError(
            f"block_sparse_attention: queries {tuple(q_BNTH.shape)}, keys {tuple(k_BKSH.shape)}, "
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
