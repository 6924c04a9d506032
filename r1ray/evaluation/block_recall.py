"""What dense attention looks at, and how much of it is in the blocks that gates choose.

One dense forward over a sequence; in every layer, the last queries' attention is summed by block
and compared with the blocks that their gate keeps: of all attention, and of the block that a needle
is in, where a head looks there.

Price: a dense forward, and Q·T scores a head and layer.

Shape legend: N query heads, K groups, Q last queries, T tokens, C blocks, M chosen ones.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.models.decoder import Attention, Decoder
from r1ray.models.gates import list_attentions
from r1ray.models.rope import rotary_tables
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.cached_states import CachedStates, quantize_states

__all__ = ["BlockRecall", "measure_block_recall"]

_LOOKS = 0.1  # of a head's attention on the needle's block


@dataclass(frozen=True)
class BlockRecall:
    """Of the last queries of one sequence.

    Attributes:
        mass: for each layer, the share of attention that falls on what is kept.
        num_looks: heads and queries that give the needle's block at least a tenth.
        num_found: those of them whose group keeps that block.
    """

    mass: list[float]
    num_looks: int
    num_found: int


@torch.inference_mode()
def measure_block_recall(
    model: Decoder,
    ids_1T: Tensor,
    *,
    num_queries: int,
    needle_token: int | None = None,
    unit: int = 1,
    has_int8_keys: bool = False,
) -> BlockRecall:
    """Attention of the last `num_queries` tokens of `ids_1T` against their gates' choice.

    Args:
        model: sparse.
        needle_token: position of a token that the needle's block holds.
        unit: queries that choose together: 1 as where they are written, 64 as where they are read;
            they are whole units then, from the beginning of a block on.
        has_int8_keys: whether heads that choose by the keys do so by those of an int8 cache.
    """
    tokens = ids_1T.shape[1]
    positions_1T = torch.arange(tokens, device=ids_1T.device)[None]
    cos, sin = rotary_tables(model.config, positions_1T)
    last, whole = slice(tokens - num_queries, tokens), tokens // BLOCK * BLOCK
    owns = [at // BLOCK for at in range(tokens - num_queries, tokens)]
    mass: list[float] = []
    looks = torch.zeros(2, dtype=torch.long)

    def observe(
        attention: Attention, q_BTNH: Tensor, _k: Tensor, q_BNTH: Tensor, k_BKTH: Tensor
    ) -> None:
        gate = attention.gate
        assert gate is not None
        summaries = gate.summarize(k_BKTH[:, :, :whole], cos[:, :, :whole], sin[:, :, :whole])
        rotary = (cos[:, :, last], sin[:, :, last])
        queries = (q_BTNH[:, last], q_BNTH[:, :, last])
        keys = CachedStates(*quantize_states(k_BKTH)) if has_int8_keys else CachedStates(k_BKTH)
        chosen = gate.choose(*queries, rotary, summaries, keys, [last.start], unit)
        chosen_KQM = chosen[0].repeat_interleave(unit, dim=1)
        kept_KQC = _kept(chosen_KQM, owns, -(-tokens // BLOCK))
        share_NQC = _attention_by_block(q_BNTH[0, :, last], k_BKTH[0])
        kept_NQC = kept_KQC.repeat_interleave(len(share_NQC) // len(kept_KQC), dim=0)
        mass.append(float((share_NQC * kept_NQC).sum(-1).mean()))
        if needle_token is not None:
            is_look_NQ = share_NQC[..., needle_token // BLOCK] >= _LOOKS
            is_found_NQ = is_look_NQ & kept_NQC[..., needle_token // BLOCK]
            looks.add_(torch.stack([is_look_NQ.sum(), is_found_NQ.sum()]).cpu())

    attentions = list_attentions(model)
    for attention in attentions:
        attention.observe = observe
    try:
        model.hidden(ids_1T)
    finally:
        for attention in attentions:
            attention.observe = None
    return BlockRecall(mass, int(looks[0]), int(looks[1]))


def _kept(chosen_KQM: Tensor, owns: list[int], blocks: int) -> Tensor:
    """Whether a query sees a block: bool [K, Q, C]."""
    blocks_C = torch.arange(blocks, device=chosen_KQM.device)
    own_Q1 = torch.tensor(owns, device=chosen_KQM.device)[:, None]
    is_local_QC = (blocks_C == own_Q1) | (blocks_C == own_Q1 - 1)
    return (chosen_KQM[..., None] == blocks_C).any(2) | is_local_QC


def _attention_by_block(q_NQH: Tensor, k_KTH: Tensor) -> Tensor:
    """Shares [N, Q, C] of the attention of the last Q of T tokens."""
    queries, tokens = q_NQH.shape[1], k_KTH.shape[1]
    k_NTH = k_KTH.repeat_interleave(len(q_NQH) // len(k_KTH), dim=0)
    scores_NQT = q_NQH.float() @ k_NTH.float().mT / math.sqrt(q_NQH.shape[-1])
    at_Q1 = torch.arange(tokens - queries, tokens, device=q_NQH.device)[:, None]
    is_later_QT = torch.arange(tokens, device=q_NQH.device) > at_Q1
    shares_NQT = scores_NQT.masked_fill(is_later_QT, -math.inf).softmax(-1)
    return F.pad(shares_NQT, (0, -tokens % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
