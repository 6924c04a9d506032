"""Causal grouped-query attention within whole sequences, in float32 where a CPU trains.

Autocast would give it the narrow format. On a CPU, torch's narrow flash backward allocates inside
its threads, and those wait for one another at the one heap that training uses: 12.7 ms a call
against 1.3 in float32 (4 rows of 128 tokens, 4 heads, 2 threads with AVX512-BF16). With a heap for
each thread it still takes 1.9 times as long at 128 tokens, as long at 512, and 0.8 at 2,048.

Over a cache, queries see all of what was there before and their own piece causally: two attentions
without a mask over all, merged by their log-sum-exps. On a CPU, the native kernel of block-sparse
attention does it, every block chosen, where it was built.

Price: 4·T²·N·H FLOP, the triangle above the diagonal skipped; over a cache 4·T·(S - T/2)·N·H.

Shape legend: B rows, T new tokens, S cached tokens with them, N query heads, K key/value heads,
G = N/K heads of a group, H head dimension.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.ops import native
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.cached_states import CachedStates

__all__ = ["cached_attention", "causal_attention", "flash_attention", "merge_attention"]


def causal_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Tensor:
    """softmax(q·kᵀ/√H)·v over the tokens up to each: [B, N, T, H]; N is a multiple of K."""
    is_causal = q_BNTH.shape[2] > 1
    if q_BNTH.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        wide = (q_BNTH.float(), k_BKTH.float(), v_BKTH.float())
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(*wide, is_causal=is_causal, enable_gqa=True)
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKTH, v_BKTH, is_causal=is_causal, enable_gqa=True
    )


def cached_attention(q_BNTH: Tensor, k: CachedStates, v: CachedStates, starts: list[int]) -> Tensor:
    """softmax(q·kᵀ/√H)·v over all cached tokens up to each query: [B, N, T, H].

    Args:
        q_BNTH: the queries of row b are at positions starts[b], starts[b] + 1, ...
        k, v: [B, K, S, H]; those beyond a row's last query may hold anything finite.
    """
    tokens, dtype = q_BNTH.shape[2], q_BNTH.dtype
    is_in_blocks = tokens == 1 or not any(start % BLOCK for start in starts)
    if is_in_blocks and native.can_attend(q_BNTH, k.data_BKSH):
        # Whole blocks of queries, and what is left one by one: as a decoder's native layers do.
        body = tokens // BLOCK * BLOCK
        parts = []
        for part, unit in ((slice(0, body), BLOCK), (slice(body, tokens), 1)):
            if part.start == part.stop:
                continue
            q, firsts = q_BNTH[:, :, part], [start + part.start for start in starts]
            chosen = _every_block(tuple(firsts), part.stop - part.start, unit, k.shape[1])
            parts.append(
                native.sparse_attention(
                    *(q, k.data_BKSH, v.data_BKSH, chosen, firsts),
                    key_scale_BKS=k.scale_BKS,
                    value_scale_BKS=v.scale_BKS,
                )
            )
        return torch.cat(parts, dim=2)
    if tokens == 1:
        return _attend_last(q_BNTH, k, v, starts)
    rows = []
    for row, start in enumerate(starts):
        q_1NTH, k_row, v_row = q_BNTH[row : row + 1], k.row(row), v.row(row)
        own = (slice(None), slice(None), slice(start, start + tokens))
        before = (slice(None), slice(None), slice(0, start))
        groups = q_1NTH.shape[1] // k.shape[1]
        own_states = (x[own].to(dtype).repeat_interleave(groups, dim=1) for x in (k_row, v_row))
        found = flash_attention(q_1NTH, *own_states, is_causal=True)
        if start:
            folded = q_1NTH.unflatten(1, (-1, groups)).flatten(2, 3)
            far, far_lse = flash_attention(
                folded, k_row[before].to(dtype), v_row[before].to(dtype), is_causal=False
            )
            far_and_lse = (far.reshape(found[0].shape), far_lse.reshape(found[1].shape))
            rows.append(merge_attention(found, far_and_lse))
        else:
            rows.append(found[0])
    return torch.cat(rows)


@functools.lru_cache(maxsize=8)
def _every_block(starts: tuple[int, ...], tokens: int, unit: int, kv_heads: int) -> Tensor:
    """All blocks that a unit may choose, for the kernel of block-sparse attention."""
    units_U = torch.arange(-(-tokens // unit))
    own_BU1 = ((torch.tensor(starts)[:, None] + units_U * unit) // BLOCK)[..., None]
    blocks_M = torch.arange(max(0, int(own_BU1.max()) - 1))
    chosen_BUM = torch.where(blocks_M < own_BU1 - 1, blocks_M, -1)
    return chosen_BUM[:, None].expand(-1, kv_heads, -1, -1).contiguous()


def _attend_last(q_BN1H: Tensor, k: CachedStates, v: CachedStates, starts: list[int]) -> Tensor:
    """One query a row; a group's are folded, so that keys and values are not copied for them."""
    mask_B11S = None
    if any(start + 1 < k.shape[2] for start in starts):
        last_B = torch.tensor(starts, device=q_BN1H.device)
        slots_S = torch.arange(k.shape[2], device=q_BN1H.device)
        mask_B11S = (slots_S <= last_B[:, None])[:, None, None]
    out_BKGH = F.scaled_dot_product_attention(
        q_BN1H.squeeze(2).unflatten(1, (k.shape[1], -1)),
        k.floats().to(q_BN1H.dtype),
        v.floats().to(q_BN1H.dtype),
        attn_mask=mask_B11S,
    )
    return out_BKGH.reshape(q_BN1H.shape)


def flash_attention(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention [B, N, T, H] of as many key as query heads, and its log-sum-exps [B, N, T]."""
    aten = torch.ops.aten
    if q_BNTH.device.type == "cpu":
        states = (q_BNTH.contiguous(), k_BNSH.contiguous(), v_BNSH.contiguous())
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*states, 0.0, is_causal)
        return out, lse
    if q_BNTH.is_cuda and q_BNTH.shape[-1] % 8 == 0:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q_BNTH, k_BNSH, v_BNSH, None, True, 0.0, is_causal
        )
        return out, lse[..., : q_BNTH.shape[2]]  # torch pads it
    scores = torch.matmul(q_BNTH.float() / math.sqrt(q_BNTH.shape[-1]), k_BNSH.float().mT)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q_BNTH.device).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp().to(v_BNSH.dtype), v_BNSH), lse


def merge_attention(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys from that over each, by their log-sum-exps."""
    share = torch.sigmoid(one[1] - other[1])[..., None].to(one[0].dtype)
    return torch.lerp(other[0], one[0], share)
