"""A learned guess of which blocks of keys a query will attend to, and what it is to guess.

For one layer and group of query heads, q̂ is a projection of the group's queries and k̂ of the
largest, least and mean key of a block, both before rotary positions, normed, and rotated by the
query's position and by that of the block's first key. The score is q̂·k̂/√H.

Without a trained gate, `BoundsGate` scores a single query by the most that any key within a block's
least and greatest elements could score, and a block of queries by the best match of a query with a
block's mean key; both after rotary positions, the largest of the group's heads.

What a query needs of a block is the largest weight that any key of it has in any of the group's
heads; what a unit needs, the most that one of its queries does, since a token that one of them
misses is missed. A gate's scores are to have the shares of these, for queries and for units, of the
blocks that there are to choose from.

Some heads look for single tokens, which no summary of 64 keys shows. In training, a gate counts the
peaks of attention in blocks that it would not choose; the heads that miss most are marked
(`mark_heads`), and choose for their groups by the keys themselves (`r1ray.ops.exact_choice`).

Price: (G + 3)·H² multiplications a token and group, and 2·C·H a query and group to score; what a
query needs takes one attention over all earlier keys. Parameters: (G + 3)·H² a group and layer.

Sources: SeerAttention-R, arXiv:2506.08889; bounds: Quest, arXiv:2406.10774.

Shape legend: B rows, T queries, U units of queries, L queries of one unit or keys of whole blocks,
N query heads, K groups, G = N/K, S keys, C blocks, H head size, P = 3·H pooled features,
X size of a summary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from r1ray.ops import native
from r1ray.ops.block_selection import BLOCK, choose_blocks, count_chosen, own_blocks
from r1ray.ops.cached_states import CachedStates
from r1ray.ops.exact_choice import choose_exact

__all__ = [
    "BlockGate",
    "BoundsGate",
    "count_missed",
    "gate_loss",
    "gate_targets",
    "kept_blocks",
    "mark_heads",
    "pool_keys",
    "unit_recall",
]

_EPS = 1e-6
_PEAK = 0.1  # of a query's attention on one key


class BlockGate(nn.Module):
    """The gate of one layer; before it is trained, it compares the mean query with the mean key.

    Attributes:
        summary_size: floats that a block's summary takes, for each group.
        missed: float [N], peaks a query that each head missed in training, lately.
        is_marked: bool [N], heads that choose by the keys themselves.
    """

    missed: Tensor
    is_marked: Tensor

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("missed", torch.zeros(num_heads))
        self.register_buffer("is_marked", torch.zeros(num_heads, dtype=torch.bool))
        self.summary_size = head_dim
        groups, identity = num_heads // num_kv_heads, torch.eye(head_dim)
        query = torch.cat([identity / groups] * groups)
        key = torch.cat([torch.zeros(2 * head_dim, head_dim), identity])
        self.query_weight = nn.Parameter(query.repeat(num_kv_heads, 1, 1))
        self.key_weight = nn.Parameter(key.repeat(num_kv_heads, 1, 1))
        self.query_norm = nn.Parameter(torch.ones(head_dim))
        self.key_norm = nn.Parameter(torch.ones(head_dim))

    def queries(self, q_BTNH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
        """q̂ [B, K, T, H] of queries before rotary positions."""
        kv_heads = self.query_weight.shape[0]
        grouped_BTKX = q_BTNH.unflatten(2, (kv_heads, -1)).flatten(3)
        projected = torch.einsum("btkx,kxh->bkth", grouped_BTKX.float(), self.query_weight)
        return _rotate(_norm(projected, self.query_norm), cos_B1TH, sin_B1TH)

    def keys(self, pooled_BKCP: Tensor, cos_B1CH: Tensor, sin_B1CH: Tensor) -> Tensor:
        """k̂ [B, K, C, H] of `pool_keys`; rotary tables of each block's first position."""
        projected = torch.einsum("bkcp,kph->bkch", pooled_BKCP.float(), self.key_weight)
        return _rotate(_norm(projected, self.key_norm), cos_B1CH, sin_B1CH)

    @staticmethod
    def scores(queries_BKTH: Tensor, keys_BKCH: Tensor) -> Tensor:
        """[B, K, T, C]; higher means more attention is expected."""
        return queries_BKTH @ keys_BKCH.transpose(-1, -2) / math.sqrt(keys_BKCH.shape[-1])

    def summarize(self, k_BKLH: Tensor, cos_B1LH: Tensor, sin_B1LH: Tensor) -> Tensor:
        """k̂ [B, K, C, H] of whole blocks of keys with rotary positions, and their tables."""
        turned_back = _turn_back(k_BKLH.float(), cos_B1LH, sin_B1LH)
        pooled = pool_keys(turned_back.transpose(1, 2))
        return self.keys(pooled, cos_B1LH[:, :, ::BLOCK], sin_B1LH[:, :, ::BLOCK])

    def score(
        self,
        q_BTNH: Tensor,
        q_BNTH: Tensor,  # noqa: ARG002
        rotary: tuple[Tensor, Tensor],
        summaries_BKCX: Tensor,
        unit: int,
    ) -> Tensor:
        """[B, K, U, C] of units of `unit` queries, each the largest of its queries' scores.

        Args:
            q_BTNH, q_BNTH: before and after rotary positions, whose tables follow.
        """
        scores_BKTC = self.scores(self.queries(q_BTNH, *rotary), summaries_BKCX)
        return scores_BKTC.unflatten(2, (-1, unit)).amax(3)

    def choose(
        self,
        q_BTNH: Tensor,
        q_BNTH: Tensor,
        rotary: tuple[Tensor, Tensor],
        summaries_BKCX: Tensor,
        k: CachedStates,
        starts: list[int],
        unit: int,
    ) -> Tensor:
        """The blocks [B, K, U, M] that each unit keeps, as `choose_blocks` has them.

        Args:
            k: [B, K, S, H], of positions 0 to S - 1.
            starts: position of each row's first query.
        """
        own_BU = own_blocks(starts, q_BTNH.shape[1], unit)
        if native.can_attend(q_BTNH, summaries_BKCX):
            counts = [[count_chosen(own) for own in row] for row in own_BU]
            weights = (self.query_weight, self.query_norm)
            chosen = native.choose_blocks(
                q_BTNH, *weights, rotary, summaries_BKCX, counts, starts, unit
            )
        else:
            scores = self.score(q_BTNH, q_BNTH, rotary, summaries_BKCX, unit)
            chosen = choose_blocks(scores, torch.tensor(own_BU, device=scores.device))
        if not self.has_marks:
            return chosen
        return choose_exact(q_BNTH, k, self.is_marked, chosen, starts)

    @property
    def has_marks(self) -> bool:
        """Whether any head is marked."""
        return bool(self.is_marked.any())


class BoundsGate(nn.Module):
    """What stands in for the gate of one layer that was not trained; it has no parameters."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.summary_size = 3 * head_dim

    @staticmethod
    def summarize(k_BKLH: Tensor, cos_B1LH: Tensor, sin_B1LH: Tensor) -> Tensor:  # noqa: ARG004
        """Greatest, least and mean key [B, K, C, 3·H] of whole blocks, with rotary positions."""
        return pool_keys(k_BKLH.transpose(1, 2))

    @staticmethod
    def score(
        q_BTNH: Tensor,  # noqa: ARG004
        q_BNTH: Tensor,
        rotary: tuple[Tensor, Tensor],  # noqa: ARG004
        summaries_BKCX: Tensor,
        unit: int,
    ) -> Tensor:
        """As `BlockGate.score`."""
        q_BKGTH = q_BNTH.float().unflatten(1, (summaries_BKCX.shape[1], -1))
        greatest, least, mean = summaries_BKCX.mT[:, :, None].chunk(3, dim=3)
        if unit == 1:
            scores = q_BKGTH.clamp_min(0) @ greatest + q_BKGTH.clamp_max(0) @ least
        else:
            scores = q_BKGTH @ mean
        return scores.amax(2).unflatten(2, (-1, unit)).amax(3)

    def choose(
        self,
        q_BTNH: Tensor,
        q_BNTH: Tensor,
        rotary: tuple[Tensor, Tensor],
        summaries_BKCX: Tensor,
        k: CachedStates,  # noqa: ARG002
        starts: list[int],
        unit: int,
    ) -> Tensor:
        """As `BlockGate.choose`."""
        own_BU = torch.tensor(own_blocks(starts, q_BTNH.shape[1], unit), device=q_BTNH.device)
        return choose_blocks(self.score(q_BTNH, q_BNTH, rotary, summaries_BKCX, unit), own_BU)


def pool_keys(k_BSKH: Tensor) -> Tensor:
    """Largest, least and mean of whole blocks of keys before rotary positions: [B, K, C, P]."""
    whole = k_BSKH.shape[1] // BLOCK * BLOCK
    blocks_BCLKH = k_BSKH[:, :whole].float().unflatten(1, (-1, BLOCK))
    pooled = [blocks_BCLKH.amax(2), blocks_BCLKH.amin(2), blocks_BCLKH.mean(2)]
    return torch.cat(pooled, dim=-1).transpose(1, 2)


@torch.no_grad()
def gate_targets(q_BNLH: Tensor, k_BKSH: Tensor, start: int) -> Tensor:
    """[B, N, L, C]: the largest weight that a key of each block before `start` has for a query.

    Args:
        q_BNLH: with rotary positions; of a unit, from position `start` on, a multiple of 64.
        k_BKSH: with rotary positions, from position 0 on, to the end of the unit at least.
    """
    kv_heads, tokens = k_BKSH.shape[1], q_BNLH.shape[2]
    scaled_BNLH = q_BNLH.float() / math.sqrt(q_BNLH.shape[-1])
    of_groups_BKXH = scaled_BNLH.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # X: heads and queries
    scores_BKXS = of_groups_BKXH @ k_BKSH[:, :, : start + tokens].float().mT
    scores_BNLS = scores_BKXS.unflatten(2, (-1, tokens)).flatten(1, 2)
    is_later_LL = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BNLH.device).triu(1)
    scores_BNLS[..., start:].masked_fill_(is_later_LL, -math.inf)
    shares_BNLS = scores_BNLS.softmax(-1)
    return shares_BNLS[..., :start].unflatten(-1, (start // BLOCK, BLOCK)).amax(-1)


def gate_loss(scores_BKLC: Tensor, largest_BNLC: Tensor, is_target_BL: Tensor) -> Tensor:
    """The divergences of one unit's guesses, in nats, summed over target tokens; groups averaged.

    KL(target ‖ softmax(score)) over the blocks that may be chosen: neither the first nor the one
    before the unit's own. Once for each query; and once for the unit, whose scores and weights are
    the largest of its queries', which counts as often as it has targets.

    Args:
        largest_BNLC: of `gate_targets`.
        is_target_BL: queries that count; others take no part in the unit either.
    """
    needs_BKLC = _needs(scores_BKLC, largest_BNLC, is_target_BL)
    of_queries_BKL = _divergence(scores_BKLC, needs_BKLC) * is_target_BL[:, None]
    of_unit_BK = _divergence(_of_unit(scores_BKLC, is_target_BL), needs_BKLC.amax(2))
    counts_B1 = is_target_BL.sum(1, keepdim=True)
    return (of_queries_BKL.sum(2) + of_unit_BK * counts_B1).mean(1).sum()


@torch.no_grad()
def unit_recall(scores_BKLC: Tensor, largest_BNLC: Tensor, is_target_BL: Tensor) -> Tensor:
    """Of what units need of the blocks that may be chosen, the shares in those that are.

    One for each row and group that needs any; arguments as in `gate_loss`.
    """
    needs_BKC = _needs(scores_BKLC, largest_BNLC, is_target_BL).amax(2)
    scores_BK1C = _of_unit(scores_BKLC, is_target_BL)[:, :, None]
    kept_BKC = kept_blocks(scores_BK1C, scores_BKLC.shape[3] * BLOCK)[:, :, 0]
    found_BK, all_BK = ((needs_BKC * kept)[..., 1:-1].sum(2) for kept in (kept_BKC, 1))
    return (found_BK / all_BK)[all_BK > 0]


def _needs(scores_BKLC: Tensor, largest_BNLC: Tensor, is_target_BL: Tensor) -> Tensor:
    """Of each group's queries, [B, K, L, C]; 0 of those that do not count."""
    of_group_BKLC = largest_BNLC.unflatten(1, (scores_BKLC.shape[1], -1)).amax(2)
    return of_group_BKLC * is_target_BL[:, None, :, None]


def _of_unit(scores_BKLC: Tensor, is_target_BL: Tensor) -> Tensor:
    """The largest of the queries that count: [B, K, C]."""
    return scores_BKLC.float().masked_fill(~is_target_BL[:, None, :, None], -1e30).amax(2)


def _divergence(scores_C: Tensor, weights_C: Tensor) -> Tensor:
    """KL over the last dimension but for its ends; 0 where they have all the weight."""
    scores, weights = scores_C[..., 1:-1].float(), weights_C[..., 1:-1]
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return (torch.special.xlogy(shares, shares) - shares * scores.log_softmax(-1)).sum(-1)


@torch.no_grad()
def kept_blocks(scores_BKTC: Tensor, start: int) -> Tensor:
    """Whether a query keeps a block, by its score or its place: bool [B, K, T, C]."""
    tokens, blocks = scores_BKTC.shape[2:]
    own_T = (start + torch.arange(tokens, device=scores_BKTC.device)) // BLOCK
    chosen_BKTM = choose_blocks(scores_BKTC, own_T[None])
    is_kept = torch.zeros(*scores_BKTC.shape[:3], blocks + 1, dtype=torch.bool, device=own_T.device)
    is_kept.scatter_(3, chosen_BKTM.masked_fill(chosen_BKTM < 0, blocks), value=True)
    return is_kept[..., :blocks] | (torch.arange(blocks, device=own_T.device) >= own_T[:, None] - 1)


@torch.no_grad()
def count_missed(kept_BKTC: Tensor, largest_BNTC: Tensor) -> Tensor:
    """Blocks [B, N, T] with a key of at least a tenth of a query's attention that are not kept.

    Args:
        kept_BKTC, largest_BNTC: of `kept_blocks` and of `gate_targets`.
    """
    kept_BNTC = kept_BKTC.repeat_interleave(largest_BNTC.shape[1] // kept_BKTC.shape[1], dim=1)
    return ((largest_BNTC >= _PEAK) & ~kept_BNTC).sum(-1)


def mark_heads(gates: Sequence[BlockGate], share: float) -> None:
    """Mark the heads that miss most, at most that share of all heads of all layers."""
    missed = torch.stack([gate.missed for gate in gates])
    count = int(share * missed.numel())
    worst = missed.flatten().topk(count)
    is_marked = torch.zeros(missed.numel(), dtype=torch.bool, device=missed.device)
    is_marked[worst.indices[worst.values > 0]] = True
    for gate, marks in zip(gates, is_marked.view_as(missed), strict=True):
        gate.is_marked.copy_(marks)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What was rotated by these tables."""
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat([second, -first], dim=-1) * sin
    return turned / (cos.square() + sin.square())
