"""Which blocks a unit of queries keeps where no summary shows them: by the keys themselves.

For marked heads of `r1ray.ops.block_gate`, which look for single tokens. A softmax over the largest
score in every earlier block gives a query's shares of the blocks; a block counts as the sum of
their squares over the unit's queries. The group keeps the best besides those that its gate has
chosen; a unit of one query keeps every block.

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
from r1ray.ops.block_selection import BLOCK, choose_blocks, count_exact
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
    counts = [[count_exact(own, unit) for own in row] for row in owns_BU]
    most = max((max(row, default=0) for row in counts), default=0)
    chosen = F.pad(chosen_BKUM, (0, max(0, most - chosen_BKUM.shape[3])), value=-1)
    if native.can_attend(q_BNTH, k.data_BKSH):
        native.choose_exact(
            *(q_BNTH, k.data_BKSH, is_marked_N, counts, starts, chosen), key_scale_BKS=k.scale_BKS
        )
        return chosen
    is_marked_KG = is_marked_N.unflatten(0, (k.shape[1], -1))
    if unit == 1:
        own_BU1 = torch.tensor(owns_BU, device=chosen.device)[..., None]
        blocks_M = torch.arange(chosen.shape[3], device=chosen.device)
        every_BUM = torch.where(blocks_M < own_BU1 - 1, blocks_M, -1)
        return torch.where(is_marked_KG.any(1)[:, None, None], every_BUM[:, None], chosen)
    q_BKGTH = q_BNTH.unflatten(1, (k.shape[1], -1))
    for group in is_marked_KG.any(1).nonzero().flatten().tolist():
        for row, owns in enumerate(owns_BU):
            q_GTH = q_BKGTH[row, group, is_marked_KG[group]]
            before_UM = chosen[row, group]
            best = _choose_row(q_GTH, k.row(row).group(group), before_UM, owns)
            chosen[row, group] = F.pad(best, (0, chosen.shape[3] - best.shape[1]), value=-1)
    return chosen


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
    is_kept_UC = torch.zeros(len(owns), blocks + 1, dtype=torch.bool, device=q_GTH.device)
    is_kept_UC.scatter_(1, torch.where(before_UM < 0, blocks, before_UM), value=True)
    scores_UC = scores_UC.masked_fill(is_kept_UC[:, :blocks], 1e30)
    own_1U = torch.tensor([owns], device=q_GTH.device)
    return choose_blocks(scores_UC[None, None], own_1U, lambda own: count_exact(own, BLOCK))[0, 0]


def _score_units(q_GTH: Tensor, k_SH: Tensor, owns: list[int]) -> Tensor:
    """[U, C] of the units that fit into these queries."""
    scores_GTS = q_GTH @ k_SH.T / math.sqrt(k_SH.shape[1])
    whole = len(k_SH) // BLOCK * BLOCK
    peaks_GTC = scores_GTS[..., :whole].unflatten(-1, (-1, BLOCK)).amax(-1)
    peaks_GULC = peaks_GTC.unflatten(1, (-1, BLOCK))
    own_U = torch.tensor(owns[: peaks_GULC.shape[1]], device=k_SH.device)
    is_earlier_UC = torch.arange(peaks_GULC.shape[3], device=k_SH.device) < own_U[:, None]
    peaks_GULC = peaks_GULC.masked_fill(~is_earlier_UC[:, None], -1e30)
    return peaks_GULC.softmax(-1).square().sum((0, 2))
