"""Which blocks a unit of queries keeps where no summary shows them: by the keys themselves.

For marked heads of `r1ray.ops.block_gate`, which look for single tokens. A softmax over the largest
score in every earlier block gives a query's shares of the blocks; a block counts as the sum of
their squares over the unit's queries. The group keeps the best besides those that its gate has
chosen.

Price: the products of queries and keys of dense attention, without its softmax and its sums of
values; half of it on a CPU, a quarter in int8. They grow with n² as well, in a few of the heads.

Shape legend: B rows, T queries, N query heads, K groups, G = N/K, S keys, H head dimension, U units
of L queries, M chosen blocks, C blocks of keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.ops import native
from r1ray.ops.block_selection import BLOCK, choose_blocks, count_exact, split_tokens
from r1ray.ops.cached_states import CachedStates

__all__ = ["choose_exact"]

_UNITS_TOGETHER = 8


def choose_exact(
    q_BNTH: Tensor,
    k: CachedStates,
    is_marked_N: Tensor,
    chosen_BKUM: Tensor,
    starts: list[int],
) -> Tensor:
    """The choice, of more blocks in groups of marked heads: int64 [B, K, U, M'], -1 behind them.

    Args:
        q_BNTH: with rotary positions; those of row b are at positions starts[b], starts[b] + 1, ...
        k: [B, K, S, H], of positions 0 to S - 1.
        is_marked_N: bool.
        chosen_BKUM: what gates have chosen. Units have one token each where U = T, else 64, and
            then every start is a multiple of 64, and T is one.
    """
    units = chosen_BKUM.shape[2]
    unit = 1 if units == q_BNTH.shape[2] else BLOCK
    owns_BU = [[(start + at * unit) // BLOCK for at in range(units)] for start in starts]
    counts = [[count_exact(own) for own in row] for row in owns_BU]
    most = max((max(row, default=0) for row in counts), default=0)
    chosen = F.pad(chosen_BKUM, (0, max(0, most - chosen_BKUM.shape[3])), value=-1)
    if native.can_attend(q_BNTH, k.data_BKSH):
        native.choose_exact(
            *(q_BNTH, k.data_BKSH, is_marked_N, counts, starts, chosen), key_scale_BKS=k.scale_BKS
        )
        return chosen
    is_marked_KG = is_marked_N.unflatten(0, (k.shape[1], -1))
    if unit == 1:
        return _choose_tokens(q_BNTH, k, is_marked_KG, chosen, owns_BU)
    q_BKGTH = q_BNTH.unflatten(1, (k.shape[1], -1))
    for group in is_marked_KG.any(1).nonzero().flatten().tolist():
        for row, owns in enumerate(owns_BU):
            q_GTH = q_BKGTH[row, group, is_marked_KG[group]]
            before_UM = chosen[row, group]
            best = _choose_row(q_GTH, k.row(row).group(group), before_UM, owns)
            chosen[row, group] = F.pad(best, (0, chosen.shape[3] - best.shape[1]), value=-1)
    return chosen


def _choose_tokens(
    q_BNTH: Tensor,
    k: CachedStates,
    is_marked_KG: Tensor,
    before_BKTM: Tensor,
    owns_BT: list[list[int]],
) -> Tensor:
    """[B, K, T, M] of single queries, a few at a time."""
    chosen = [
        _choose_few(q, k, is_marked_KG, before, [row[part] for row in owns_BT])
        for part, q, before in split_tokens(q_BNTH, before_BKTM)
    ]
    return torch.cat(chosen, dim=2) if chosen else before_BKTM


def _choose_few(
    q_BNTH: Tensor,
    k: CachedStates,
    is_marked_KG: Tensor,
    before_BKTM: Tensor,
    owns_BT: list[list[int]],
) -> Tensor:
    blocks = max(map(max, owns_BT)) + 1
    padding = max(0, blocks * BLOCK - k.shape[2])
    k_BKSH = F.pad(k.floats()[:, :, : blocks * BLOCK].float(), (0, 0, 0, padding))
    q_BKGTH = q_BNTH.float().unflatten(1, (k.shape[1], -1))
    scores_BKGTS = q_BKGTH @ k_BKSH.transpose(2, 3)[:, :, None] / math.sqrt(k_BKSH.shape[3])
    own_BT = torch.tensor(owns_BT, device=q_BNTH.device)
    shares_BKGTC = _share_blocks(scores_BKGTS, own_BT[:, None, None])
    worth_BKTC = (shares_BKGTC.square() * is_marked_KG[..., None, None]).sum(2)
    best = _choose_best(worth_BKTC, before_BKTM, own_BT)
    best = F.pad(best, (0, before_BKTM.shape[3] - best.shape[3]), value=-1)
    return torch.where(is_marked_KG.any(1)[:, None, None], best, before_BKTM)


def _choose_row(q_GTH: Tensor, k: CachedStates, before_UM: Tensor, owns: list[int]) -> Tensor:
    """[U, M] of one group in units of a block, those of `before_UM` among them."""
    blocks = max(owns, default=0) + 1
    k_SH = k[0, 0, : blocks * BLOCK].float()
    together = _UNITS_TOGETHER * (8 if q_GTH.is_cuda else 1)  # on a GPU, launches take most time
    scores_UC = torch.cat(
        [
            _score_units(part, k_SH, owns[at * together :])
            for at, part in enumerate(q_GTH.float().split(together * BLOCK, dim=1))
        ]
    )
    own_1U = torch.tensor([owns], device=q_GTH.device)
    return _choose_best(scores_UC[None, None], before_UM[None, None], own_1U)[0, 0]


def _score_units(q_GTH: Tensor, k_SH: Tensor, owns: list[int]) -> Tensor:
    """[U, C] of the units that fit into these queries."""
    scores_GTS = q_GTH @ k_SH.T / math.sqrt(k_SH.shape[1])
    scores_GULS = scores_GTS.unflatten(1, (-1, BLOCK))
    own_U = torch.tensor(owns[: scores_GULS.shape[1]], device=k_SH.device)
    return _share_blocks(scores_GULS, own_U[:, None]).square().sum((0, 2))


def _share_blocks(scores_S: Tensor, own: Tensor) -> Tensor:
    """Shares [..., C] of the blocks before `own` [...], of scores [..., C·64 or more]."""
    whole = scores_S.shape[-1] // BLOCK * BLOCK
    peaks_C = scores_S[..., :whole].unflatten(-1, (-1, BLOCK)).amax(-1)
    is_earlier_C = torch.arange(peaks_C.shape[-1], device=own.device) < own[..., None]
    return peaks_C.masked_fill(~is_earlier_C, -1e30).softmax(-1)


def _choose_best(worth_BKUC: Tensor, before_BKUM: Tensor, own_BU: Tensor) -> Tensor:
    """Those of `before` and the best besides: [B, K, U, M]."""
    blocks = worth_BKUC.shape[3]
    is_kept_BKUC = F.pad(torch.zeros_like(worth_BKUC, dtype=torch.bool), (0, 1))
    is_kept_BKUC.scatter_(3, torch.where(before_BKUM < 0, blocks, before_BKUM), value=True)
    worth_BKUC = worth_BKUC.masked_fill(is_kept_BKUC[..., :blocks], 1e30)
    return choose_blocks(worth_BKUC, own_BU, count_exact)
