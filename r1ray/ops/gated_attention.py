"""Attention over the blocks that a layer's gate chooses: choice and attention as one operator.

On a CPU with native kernels it is one call: reading few blocks takes less time than asking for it
thrice. Else it is `choose`, then `block_sparse_attention`.

Shape legend: B rows, T queries, N query heads, K groups, S keys, C blocks, H head size, X size of a
summary.
"""

from torch import Tensor

from r1ray.ops import native
from r1ray.ops.block_gate import BlockGate, BoundsGate
from r1ray.ops.block_selection import count_both, count_chosen, own_blocks
from r1ray.ops.block_sparse import block_sparse_attention
from r1ray.ops.cached_states import CachedStates

__all__ = ["gated_attention"]


def gated_attention(
    gate: BlockGate | BoundsGate,
    queries: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor],
    summaries_BKCX: Tensor,
    k: CachedStates,
    v: CachedStates,
    starts: list[int],
    unit: int,
) -> Tensor:
    """[B, N, T, H], as `block_sparse_attention` has it.

    Args:
        queries: [B, T, N, H] before rotary positions, whose tables follow, and [B, N, T, H] with
            them; of whole units.
        summaries_BKCX: of `gate.summarize`, of all blocks that may be chosen.
        k, v: [B, K, S, H], of positions 0 to S - 1.
        starts: position of each row's first query; multiples of 64 in units of a block.
        unit: queries of a unit: 64 or 1.
    """
    q_BTNH, q_BNTH = queries
    is_native = native.can_attend(q_BTNH, summaries_BKCX) and native.can_attend(q_BNTH, k.data_BKSH)
    if not (is_native and isinstance(gate, BlockGate)):
        chosen = gate.choose(q_BTNH, q_BNTH, rotary, summaries_BKCX, k, starts, unit)
        return block_sparse_attention(q_BNTH, k, v, chosen, starts)
    own_BU = own_blocks(starts, q_BTNH.shape[1], unit)
    counts_BU = [[count_chosen(own) for own in row] for row in own_BU]
    both_BU = [[count_both(own) for own in row] for row in own_BU] if unit == 1 else counts_BU
    scales = [states.scale_BKS for states in (k, v) if states.scale_BKS is not None]
    return native.gated_attention(
        (gate.query_weight, gate.query_norm, gate.is_marked),
        *(queries, rotary, summaries_BKCX, [k.data_BKSH, v.data_BKSH, *scales]),
        *((counts_BU, both_BU), starts, unit),
    )
