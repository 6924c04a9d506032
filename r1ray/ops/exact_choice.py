"""Which blocks a unit of queries keeps where no summary shows them: by the keys themselves.

For marked heads of `r1ray.ops.block_gate`, which look for single tokens. A softmax over the largest
score in every block up to its own gives a query's shares of the blocks; a block counts as the
largest share that any of the unit's queries gives it. The group keeps the best of these instead of
those that its gate has chosen, and as many. A single query keeps them besides: the group's other
heads look where the gate says, and one query reads few blocks anyway.

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
from r1ray.ops.block_selection import (
    BLOCK,
    choose_blocks,
    count_both,
    count_chosen,
    own_blocks,
    split_tokens,
)
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
    """What is kept, [B, K, U, M'], -1 behind it; with units of one token, M' may be larger than M.

    Args:
        q_BNTH: with rotary positions; those of row b are at positions starts[b], starts[b] + 1, ...
        k: [B, K, S, H], of positions 0 to S - 1.
        is_marked_N: bool.
        chosen_BKUM: of `choose_blocks`. Units have one token each where U = T, else 64, and then
            every start is a multiple of 64, and T is one.
    """
    if not chosen_BKUM.numel():  # no unit has blocks to choose from
        return chosen_BKUM
    units = chosen_BKUM.shape[2]
    unit = 1 if units == q_BNTH.shape[2] else BLOCK
    owns_BU = own_blocks(starts, q_BNTH.shape[2], unit)
    count = count_both if unit == 1 else count_chosen
    counts_BU = [[count(own) for own in row] for row in owns_BU]
    most = max(map(max, counts_BU))
    chosen_BKUM = F.pad(chosen_BKUM, (0, max(0, most - chosen_BKUM.shape[3])), value=-1)  # a copy
    if native.can_attend(q_BNTH, k.data_BKSH):
        native.choose_exact(
            *(q_BNTH, k.data_BKSH, is_marked_N, counts_BU, starts, chosen_BKUM),
            key_scale_BKS=k.scale_BKS,
        )
        return chosen_BKUM
    is_marked_KG = is_marked_N.unflatten(0, (k.shape[1], -1))
    if unit == 1:
        for part, q, before in split_tokens(q_BNTH, chosen_BKUM):
            _choose_tokens(q, k, is_marked_KG, before, [start + part.start for start in starts])
        return chosen_BKUM
    q_BKGTH = q_BNTH.unflatten(1, (k.shape[1], -1))
    for group in is_marked_KG.any(1).nonzero().flatten().tolist():
        for row, owns in enumerate(owns_BU):
            q_GTH = q_BKGTH[row, group, is_marked_KG[group]]
            best_UM = _choose_row(q_GTH, k.row(row).group(group), owns)
            chosen_BKUM[row, group, :, : best_UM.shape[1]] = best_UM
    return chosen_BKUM


def _choose_tokens(
    q_BNTH: Tensor,
    k: CachedStates,
    is_marked_KG: Tensor,
    chosen_BKTM: Tensor,
    starts: list[int],
) -> None:
    """Of a few single queries; `chosen_BKTM` is written in place."""
    at_T = torch.arange(q_BNTH.shape[2], device=q_BNTH.device)
    position_BT = torch.tensor(starts, device=q_BNTH.device)[:, None] + at_T
    blocks = (max(starts) + len(at_T) - 1) // BLOCK + 1
    padding = max(0, blocks * BLOCK - k.shape[2])
    k_BKSH = F.pad(k.floats()[:, :, : blocks * BLOCK].float(), (0, 0, 0, padding))
    q_BKGTH = q_BNTH.float().unflatten(1, (k.shape[1], -1))
    scores_BKGTS = q_BKGTH @ k_BKSH.transpose(2, 3)[:, :, None] / math.sqrt(k_BKSH.shape[3])
    shares_BKGTC = _share_blocks(scores_BKGTS, position_BT[:, None, None])
    worth_BKTC = (shares_BKGTC * is_marked_KG[..., None, None]).amax(2)
    is_before_BKTC = (chosen_BKTM[..., None] == torch.arange(blocks, device=k_BKSH.device)).any(3)
    worth_BKTC = worth_BKTC.masked_fill(is_before_BKTC, math.inf)
    best = choose_blocks(worth_BKTC, position_BT // BLOCK, count_both)
    before = chosen_BKTM[..., : best.shape[3]]
    before.copy_(torch.where(is_marked_KG.any(1)[:, None, None], best, before))


def _choose_row(q_GTH: Tensor, k: CachedStates, owns: list[int]) -> Tensor:
    """[U, M] of one group in units of a block."""
    blocks = max(owns, default=0) + 1
    k_SH = k[0, 0, : blocks * BLOCK].float()
    together = _UNITS_TOGETHER * (8 if q_GTH.is_cuda else 1)  # on a GPU, launches take most time
    worth_UC = torch.cat(
        [
            _rate_blocks(part, k_SH, owns[at * together :])
            for at, part in enumerate(q_GTH.float().split(together * BLOCK, dim=1))
        ]
    )
    return choose_blocks(worth_UC[None, None], torch.tensor([owns], device=q_GTH.device))[0, 0]


def _rate_blocks(q_GTH: Tensor, k_SH: Tensor, owns: list[int]) -> Tensor:
    """[U, C] of the units that fit into these queries."""
    scores_GTS = q_GTH @ k_SH.T / math.sqrt(k_SH.shape[1])
    scores_GULS = scores_GTS.unflatten(1, (-1, BLOCK))
    own_U = torch.tensor(owns[: scores_GULS.shape[1]], device=k_SH.device)
    position_UL = own_U[:, None] * BLOCK + torch.arange(BLOCK, device=k_SH.device)
    return _share_blocks(scores_GULS, position_UL).amax((0, 2))


def _share_blocks(scores_S: Tensor, position: Tensor) -> Tensor:
    """Shares [..., C] of the blocks of keys up to `position` [...], of scores [..., C·64]."""
    is_later_S = torch.arange(scores_S.shape[-1], device=position.device) > position[..., None]
    masked_S = scores_S.masked_fill(is_later_S, -1e30)
    return masked_S.unflatten(-1, (-1, BLOCK)).amax(-1).softmax(-1)
