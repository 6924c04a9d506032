"""Which blocks a unit of queries keeps: the best-scored ones, as many as its own position allows.

1. A score for every block of keys and group; those not earlier than the block before the unit's own
   do not take part (`block_sparse_attention` keeps these itself).
2. Up to `DENSE_BLOCKS` all earlier blocks are kept: attention is dense there.
3. Beyond, the first block (the sink) and the best 1.5·log2(n) others, n being the number of blocks
   up to the unit's own: attention over n tokens then costs n·log(n).

The number depends on nothing but a unit's own position, so that it is the same whether its tokens
are read in one piece, in chunks, or were written one by one.

Price: one `topk` over the scores of all blocks: 64 times fewer than there are keys.

Shape legend: B rows, K groups, U units, C blocks of keys, M chosen ones.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "DENSE_BLOCKS",
    "TOKENS_TOGETHER",
    "choose_blocks",
    "count_both",
    "count_chosen",
    "own_blocks",
    "split_tokens",
]

BLOCK = 64  # tokens, of keys and of a unit of queries
DENSE_BLOCKS = 32  # 2,048 tokens
TOKENS_TOGETHER = 32  # single queries that torch gathers keys for at once
_LEAST, _MOST = 4, 64


def own_blocks(starts: list[int], tokens: int, unit: int) -> list[list[int]]:
    """The block [B, U] that each unit's first query is in.

    Args:
        starts: position of each row's first query.
        unit: tokens of a unit.
    """
    return [[(start + at) // BLOCK for at in range(0, tokens, unit)] for start in starts]


def count_chosen(own: int) -> int:
    """Blocks that a unit in block `own` keeps besides that and the one before; with the sink."""
    earlier = max(0, own - 1)
    if own < DENSE_BLOCKS:
        return earlier
    return min(earlier, 1 + min(_MOST, max(_LEAST, math.ceil(1.5 * math.log2(own + 1)))))


def count_both(own: int) -> int:
    """As `count_chosen`, of a choice of two kinds, each of which keeps as many."""
    return min(max(0, own - 1), 2 * count_chosen(own))


def choose_blocks(
    scores_BKUC: Tensor, own_BU: Tensor, count: Callable[[int], int] = count_chosen
) -> Tensor:
    """Numbers of the chosen blocks, -1 behind them: int64 [B, K, U, M], best first.

    Args:
        scores_BKUC: float; higher is better. Blocks that are too late may hold anything.
        own_BU: int64, the block that each unit's queries are in, at most C + 1; B may be 1.
        count: how many a unit keeps, by its own block.
    """
    device, blocks = scores_BKUC.device, scores_BKUC.shape[3]
    counts_C = torch.tensor([count(own) for own in range(blocks + 2)], device=device)
    counts_BU = counts_C[own_BU]
    most = int(counts_BU.max()) if counts_BU.numel() else 0
    blocks_C = torch.arange(blocks, device=device)
    is_early_BUC = blocks_C < own_BU[..., None] - 1
    scores = scores_BKUC.float().masked_fill(~is_early_BUC[:, None], -math.inf)
    scores[..., :1] = torch.where(is_early_BUC[:, None, :, :1], math.inf, -math.inf)
    chosen = scores.topk(most, dim=3).indices
    ranks_M = torch.arange(most, device=device)
    return chosen.masked_fill(ranks_M >= counts_BU[:, None, :, None], -1)


def split_tokens(q_BNTH: Tensor, chosen_BKTM: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few single queries at a time: (which, they, their blocks)."""
    for start in range(0, q_BNTH.shape[2], TOKENS_TOGETHER):
        part = slice(start, start + TOKENS_TOGETHER)
        yield part, q_BNTH[:, :, part], chosen_BKTM[:, :, part]
