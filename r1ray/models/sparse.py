"""Block-sparse attention inside a decoder with gates: what one forward over a KV cache does.

1. Blocks of keys that the new tokens complete are pooled, from the cached keys turned back to
   before rotary positions, and their k̂ is kept in the cache: the same however the tokens came.
2. Scores of the new queries against all of k̂ decide which blocks each unit keeps. A unit is a whole
   block of queries, scored by the largest of its tokens' scores; what does not fill a block, at
   either end of the new tokens, and every written token is a unit by itself.

Price: k̂ takes H floats per block, layer and group: 1/64 of the cached keys' memory.

Shape legend: B rows, T new tokens, S cached tokens, N query heads, K key/value heads, H head
dimension, C blocks, U units, M chosen blocks.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from r1ray.models.config import ModelConfig
from r1ray.models.kv_cache import CacheSlice
from r1ray.models.rope import rotary_tables
from r1ray.ops.block_gate import pool_keys
from r1ray.ops.block_selection import DENSE_BLOCKS, choose_blocks
from r1ray.ops.block_sparse import BLOCK, block_sparse_attention

if TYPE_CHECKING:
    from r1ray.models.decoder import Attention

__all__ = ["SparseForward"]


class SparseForward:
    """One forward of `tokens` new tokens in every row of `cache`, which keeps k̂ of its blocks."""

    def __init__(self, config: ModelConfig, cache: CacheSlice, tokens: int) -> None:
        self._cache = cache
        self._starts, self._tokens = cache.starts, tokens
        self._completed: list[tuple[int, slice, slice, tuple[Tensor, Tensor]]] = []
        for row, start in enumerate(self._starts):
            blocks = slice(start // BLOCK, (start + tokens) // BLOCK)
            if blocks.start < blocks.stop:
                slots = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
                positions = torch.arange(slots.start, slots.stop, device=cache.device)[None]
                self._completed.append((row, blocks, slots, rotary_tables(config, positions)))
        self.is_dense = max(self._starts) + tokens <= DENSE_BLOCKS * BLOCK

    def update(self, attention: "Attention", k_BKSH: Tensor) -> None:
        """Keep k̂ of the blocks that are complete now."""
        gate = attention.gate
        assert gate is not None
        for row, blocks, slots, (cos, sin) in self._completed:
            turned_back = _turn_back(k_BKSH[row : row + 1, :, slots].float(), cos, sin)
            pooled = pool_keys(turned_back.transpose(1, 2))
            keys_1KCH = gate.keys(pooled, cos[:, :, ::BLOCK], sin[:, :, ::BLOCK])
            self._cache.write_blocks(attention.layer, row, blocks, keys_1KCH[0])

    def attend(
        self,
        attention: "Attention",
        q_BTNH: Tensor,
        q_BNTH: Tensor,
        rotary: tuple[Tensor, Tensor],
        k_BKSH: Tensor,
        v_BKSH: Tensor,
    ) -> Tensor:
        """[B, N, T, H]; queries before and after rotary positions."""
        gate = attention.gate
        assert gate is not None
        queries_BKTH = gate.queries(q_BTNH, *rotary)
        keys_BKCH = self._cache.read_blocks(attention.layer, -(-k_BKSH.shape[2] // BLOCK))
        k_BKSH, v_BKSH = k_BKSH.to(q_BNTH.dtype), v_BKSH.to(q_BNTH.dtype)
        if self._tokens == 1:
            scores = gate.scores(queries_BKTH, keys_BKCH)
            chosen = choose_blocks(scores, [[start // BLOCK] for start in self._starts])
            return block_sparse_attention(q_BNTH, k_BKSH, v_BKSH, chosen, self._starts)
        rows = []
        for row, start in enumerate(self._starts):
            one = slice(row, row + 1)
            parts = []
            for part, unit in _cut(start, self._tokens):
                scores = gate.scores(queries_BKTH[one, :, part], keys_BKCH[one])
                scores = scores.unflatten(2, (-1, unit)).amax(3)
                first = start + part.start
                owns = [(first + at * unit) // BLOCK for at in range(scores.shape[2])]
                chosen = choose_blocks(scores, [owns])
                parts.append(
                    block_sparse_attention(
                        q_BNTH[one, :, part], k_BKSH[one], v_BKSH[one], chosen, [first]
                    )
                )
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows)


def _cut(start: int, tokens: int) -> list[tuple[slice, int]]:
    """(new tokens, tokens of a unit): up to the next block, whole blocks, and what is left."""
    head = min(tokens, -start % BLOCK)
    body = head + (tokens - head) // BLOCK * BLOCK
    pieces = [(slice(0, head), 1), (slice(head, body), BLOCK), (slice(body, tokens), 1)]
    return [(part, unit) for part, unit in pieces if part.start < part.stop]


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `apply_rotary` was given."""
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat([second, -first], dim=-1) * sin
    return turned / (cos.square() + sin.square())
