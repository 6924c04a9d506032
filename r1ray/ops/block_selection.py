"""Which blocks a unit of queries keeps: the best-scored ones, as many as its own position allows.

1. A score for every block of keys and group; those not earlier than the block before the unit's own
   do not take part (`block_sparse_attention` keeps these itself).
2. Up to `DENSE_BLOCKS` all earlier blocks are kept: attention is dense there.
3. Beyond, the first block (the sink) and the best 1.5·log2(n) others, n being the number of blocks
   up to the unit's own: attention over n tokens then costs n·log(n).

The number depends on nothing but a unit's own position, so that it is the same whether its tokens
are read in one piece, in chunks, or were written one by one.

Very long contexts: `SummaryTree` finds the best-scored blocks without scoring all of them. A node
holds the element-wise least and greatest key summary of 8 children; what a query scores with any of
these is at most the sum of max(q·least, q·greatest). The children of the best-bounded nodes are
visited, of more nodes in the next try if one that was left out could be better.

Price: scoring all blocks, 2·C·H FLOP a unit and group; or of a tree, its top level and 8 children
of every node visited.

Shape legend: B rows, K groups, U units, C blocks of keys, M chosen ones, H size of a summary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BLOCK",
    "DENSE_BLOCKS",
    "SummaryTree",
    "choose_blocks",
    "count_chosen",
    "count_exact",
]

BLOCK = 64  # tokens, of keys and of a unit of queries
DENSE_BLOCKS = 32  # 2,048 tokens
_LEAST, _MOST = 4, 64
_EXACT_TIMES = 4
_BRANCHES = 8


def count_chosen(own: int) -> int:
    """Blocks that a unit in block `own` keeps besides that and the one before; with the sink."""
    return max(0, own - 1) if own < DENSE_BLOCKS else min(own - 1, 1 + _count_best(own))


def count_exact(own: int, unit: int) -> int:
    """As `count_chosen`, in groups that choose by the keys in blocks (`r1ray.ops.exact_choice`).

    Four times as many: each of the queries of a block may look for a token of its own. A unit of
    one token keeps all.
    """
    earlier = max(0, own - 1)
    if own < DENSE_BLOCKS or unit == 1:
        return earlier
    return min(earlier, 1 + _EXACT_TIMES * _count_best(own))


def _count_best(own: int) -> int:
    return min(_MOST, max(_LEAST, math.ceil(1.5 * math.log2(own + 1))))


def choose_blocks(
    scores_BKUC: Tensor, own_BU: list[list[int]], counts_BU: list[list[int]] | None = None
) -> Tensor:
    """Numbers of the chosen blocks, -1 behind them: int64 [B, K, U, M], best first.

    Args:
        scores_BKUC: float; higher is better. Blocks that are too late may hold anything.
        own_BU: the block that each unit's queries are in.
        counts_BU: blocks of each; None for `count_chosen`.
    """
    device = scores_BKUC.device
    if counts_BU is None:
        counts_BU = [[count_chosen(own) for own in row] for row in own_BU]
    return _choose(scores_BKUC, own_BU, torch.tensor(counts_BU, device=device))


def _choose(scores_BKUC: Tensor, own_BU: list[list[int]], counts_BU: Tensor) -> Tensor:
    device = scores_BKUC.device
    most = int(counts_BU.max()) if counts_BU.numel() else 0
    before_BU = torch.tensor(own_BU, device=device) - 1
    blocks_C = torch.arange(scores_BKUC.shape[3], device=device)
    is_early_BUC = blocks_C < before_BU[..., None]
    scores = scores_BKUC.float().masked_fill(~is_early_BUC[:, None], -math.inf)
    scores[..., :1] = torch.where(is_early_BUC[:, None, :, :1], math.inf, -math.inf)
    chosen = scores.topk(most, dim=3).indices
    ranks_M = torch.arange(most, device=device)
    return chosen.masked_fill(ranks_M >= counts_BU[:, None, :, None], -1)


class SummaryTree:
    """Best-scored summaries of one group, found by bounds.

    Args:
        summaries_CH: float, one for each block.
    """

    def __init__(self, summaries_CH: Tensor) -> None:
        self._leaves_CH = summaries_CH
        self._levels: list[tuple[Tensor, Tensor]] = []  # from the leaves' parents to the top
        least = greatest = summaries_CH
        while len(least) > _BRANCHES:
            least = _fold(least, math.inf).amin(1)
            greatest = _fold(greatest, -math.inf).amax(1)
            self._levels.append((least, greatest))

    def find(self, query_H: Tensor, count: int, *, beam: int | None = None) -> Tensor:
        """Numbers of the `count` best-scored blocks, best first: int64 [count].

        Args:
            beam: nodes that are expanded on every level; None for as many as it takes to be exact.
        """
        count = min(count, len(self._leaves_CH))
        if not self._levels:
            return (self._leaves_CH @ query_H).topk(count).indices
        width = beam or count
        while True:
            found, is_exact = self._search(query_H, count, width)
            if is_exact or beam is not None:
                return found
            width *= 2

    def _search(self, query_H: Tensor, count: int, width: int) -> tuple[Tensor, bool]:
        """(blocks, whether no block left out can be better)."""
        nodes = torch.arange(len(self._levels[-1][0]), device=query_H.device)
        left_out = -math.inf
        for level in range(len(self._levels) - 1, -1, -1):
            least, greatest = (bound[nodes] for bound in self._levels[level])
            bounds = torch.maximum(least * query_H, greatest * query_H).sum(1)
            if len(nodes) > width:
                kept = bounds.topk(width).indices
                rest = torch.ones_like(bounds, dtype=torch.bool)
                rest[kept] = False
                left_out = max(left_out, float(bounds[rest].max()))
                nodes = nodes[kept]
            size = len(self._levels[level - 1][0]) if level else len(self._leaves_CH)
            children = nodes[:, None] * _BRANCHES + torch.arange(_BRANCHES, device=nodes.device)
            nodes = children[children < size]
        scores = self._leaves_CH[nodes] @ query_H
        best = scores.topk(min(count, len(nodes)))
        is_exact = len(nodes) >= count and not float(best.values[-1]) < left_out
        return nodes[best.indices], is_exact


def _fold(x_CH: Tensor, fill: float) -> Tensor:
    """[C, H] -> [ceil(C / 8), 8, H]."""
    return F.pad(x_CH, (0, 0, 0, -len(x_CH) % _BRANCHES), value=fill).unflatten(0, (-1, _BRANCHES))
