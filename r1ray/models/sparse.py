"""Block-sparse attention inside a decoder with gates: what one forward over a KV cache does.

1. Blocks of keys that the new tokens complete are summarized, from the cached keys, and the cache
   keeps their summaries: the same however the tokens came.
2. Scores of the new queries against all summaries decide which blocks each unit keeps. A unit is a
   whole block of queries, scored by the largest of its tokens' scores; what does not fill a block,
   at either end of the new tokens, and every written token is a unit by itself.

Price: a summary takes H floats per block, layer and group: 1/64 of the memory of cached float keys.

Shape legend: B rows, T new tokens, S cached tokens, N query heads, K key/value heads, H head
dimension, C blocks, U units, M chosen blocks.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1ray.models.config import ModelConfig
from r1ray.models.kv_cache import CacheSlice
from r1ray.models.pages import count_pages
from r1ray.models.rope import rotary_tables
from r1ray.ops.block_selection import BLOCK, DENSE_BLOCKS
from r1ray.ops.cached_states import CachedStates
from r1ray.ops.gated_attention import gated_attention

if TYPE_CHECKING:
    from r1ray.models.decoder import Attention

__all__ = ["SparseForward", "cut_units"]


class SparseForward:
    """One forward of `tokens` new tokens in every row of `cache`, which keeps summaries.

    Attributes:
        completed: blocks that the new tokens complete: row, blocks, their tokens, rotary tables.
        is_dense: whether every earlier block is kept.
    """

    def __init__(self, config: ModelConfig, cache: CacheSlice, tokens: int) -> None:
        self._cache = cache
        self._starts, self._tokens = cache.starts, tokens
        self._one_by_one = cache.one_by_one
        self.completed: list[tuple[int, slice, slice, tuple[Tensor, Tensor]]] = []
        for row, start in enumerate(self._starts):
            blocks = slice(start // BLOCK, (start + tokens) // BLOCK)
            if blocks.start < blocks.stop:
                slots = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
                positions = torch.arange(slots.start, slots.stop, device=cache.device)[None]
                self.completed.append((row, blocks, slots, rotary_tables(config, positions)))
        self.is_dense = max(self._starts) + tokens <= DENSE_BLOCKS * BLOCK

    def update(self, attention: "Attention", k: CachedStates) -> None:
        """Keep summaries of the blocks that are complete now."""
        gate = attention.gate
        assert gate is not None
        for row, blocks, slots, rotary in self.completed:
            one = (slice(row, row + 1), slice(None), slots)
            self._cache.write_blocks(
                attention.layer, row, blocks, gate.summarize(k[one], *rotary)[0]
            )

    def attend(
        self,
        attention: "Attention",
        q_BTNH: Tensor,
        q_BNTH: Tensor,
        rotary: tuple[Tensor, Tensor],
        k: CachedStates,
        v: CachedStates,
    ) -> Tensor:
        """[B, N, T, H]; queries before and after rotary positions, whose tables are `rotary`."""
        gate = attention.gate
        assert gate is not None
        summaries = self._cache.read_blocks(attention.layer, count_pages(k.shape[2]))
        if self._tokens == 1:
            queries = (q_BTNH, q_BNTH)
            return gated_attention(gate, queries, rotary, summaries, k, v, self._starts, 1)
        rows = []
        for row, start in enumerate(self._starts):
            one = slice(row, row + 1)
            cos_and_sin = [table[one] if len(table) > 1 else table for table in rotary]
            parts = []
            for part, unit in cut_units(start, self._tokens, one_by_one=self._one_by_one):
                cos, sin = (table[:, :, part] for table in cos_and_sin)
                queries = (q_BTNH[one, part], q_BNTH[one, :, part])
                own = (summaries[one], k.row(row), v.row(row))
                first = [start + part.start]
                parts.append(gated_attention(gate, queries, (cos, sin), *own, first, unit))
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows)


def cut_units(start: int, tokens: int, *, one_by_one: bool = False) -> list[tuple[slice, int]]:
    """(new tokens, tokens of a unit): up to the next block, whole blocks, and what is left."""
    if one_by_one:
        return [(slice(0, tokens), 1)]
    head = min(tokens, -start % BLOCK)
    body = head + (tokens - head) // BLOCK * BLOCK
    pieces = [(slice(0, head), 1), (slice(head, body), BLOCK), (slice(body, tokens), 1)]
    return [(part, unit) for part, unit in pieces if part.start < part.stop]
