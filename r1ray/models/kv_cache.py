"""Keys and values of the sequences being decoded, in pages of one pool.

1. `KVPool` is the memory: pages of 64 tokens, each with the keys and values of all layers and, for
   sparse models, a summary of its keys.
2. A `CacheSlice` is what one forward reads and extends: for every row its stored tokens, and the
   pages that they are in.
3. `KVCache` hands a pool's pages out by rows of equal size, for whoever decodes without a
   scheduler. Rows [0, num_active) are in use.

Native kernels find a row's blocks through its pages. Torch's operators get a copy of them.

Price: a page costs 2·layers·K·64·H elements; in int8, each token and group has a float32 scale
beside its H bytes. With torch, a copy of all cached tokens a layer and forward.

Shape legend: P pages, R rows, K key/value heads, S cached tokens, T new tokens, H head dimension,
C blocks of a row, X size of a block's summary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models.config import ModelConfig
from r1ray.models.pages import count_pages
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.cached_states import CachedStates, quantize_states

__all__ = ["CacheBuffers", "CacheSlice", "KVCache", "KVPool", "page_bytes"]


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Size of a page of a `KVPool`, without a summary."""
    states = 2 * config.num_layers * config.num_kv_heads * BLOCK
    scale_bytes = torch.float32.itemsize if dtype == torch.int8 else 0
    return states * (config.head_dim * dtype.itemsize + scale_bytes)


class CacheBuffers(NamedTuple):
    """A pool's memory, and where rows lie in it, for kernels that read and write it in place.

    Attributes:
        keys, values: [layers, K, P, 64, H].
        scales: those of int8 keys and of values, each [layers, K, P, 64]; else none.
        block_keys: summaries [layers, K, P, X]; X is 0 where none are kept.
        pages_RC: int32, on the CPU.
    """

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, ...]
    block_keys: Tensor
    pages_RC: Tensor


class KVPool:
    """Memory for `num_pages` pages.

    Args:
        dtype: a floating point one, or int8.
        summary_size: floats of each page's summary (`r1ray.models.sparse`); 0 for none.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        summary_size: int = 0,
    ) -> None:
        # One more: padding behind a row's own pages goes there.
        shape = (config.num_layers, config.num_kv_heads, num_pages + 1, BLOCK, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0 and must not hold NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        scales = shape[:-1] if dtype == torch.int8 else (0,)
        self._key_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self._value_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        summaries = (*shape[:3], summary_size)
        self._block_keys = torch.zeros(summaries, dtype=torch.float32, device=device)
        self.is_int8, self.keeps_blocks = dtype == torch.int8, summary_size > 0
        self.num_pages, self.device = num_pages, self._keys.device

    def slice(
        self, tables: Sequence[Sequence[int]], starts: Sequence[int], *, one_by_one: bool = False
    ) -> "CacheSlice":
        """Rows whose blocks are in these pages, and that have so many tokens.

        Args:
            one_by_one: new tokens attend as if each had come by itself.
        """
        return CacheSlice(self, tables, starts, one_by_one=one_by_one)


class KVCache:
    """A pool for `max_rows` sequences of up to `max_tokens` tokens.

    Attributes:
        lengths: tokens stored in each active row, in row order; its length is `num_active`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        summary_size: int = 0,
    ) -> None:
        pages = count_pages(max_tokens)
        self._pool = KVPool(
            config, max_rows * pages, dtype=dtype, device=device, summary_size=summary_size
        )
        self._tables = [list(range(row * pages, (row + 1) * pages)) for row in range(max_rows)]
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.lengths: list[int] = []

    @property
    def num_active(self) -> int:
        return len(self.lengths)

    def add_rows(self, count: int) -> "CacheSlice":
        """A slice over `count` new, empty rows behind the active ones.

        Raises:
            ShapeError: fewer than `count` rows are free.
        """
        if self.num_active + count > self.max_rows:
            raise ShapeError(
                f"{count} more rows do not fit: {self.num_active} of {self.max_rows} are in use"
            )
        first = self.num_active
        self.lengths.extend([0] * count)
        return self.rows(first, count)

    def rows(self, first: int, count: int) -> "CacheSlice":
        """A slice over `count` active rows; valid until a row is added."""
        rows = slice(first, first + count)
        return CacheSlice(
            self._pool, self._tables[rows], self.lengths[rows], cache=self, first_row=first
        )

    def active(self) -> "CacheSlice":
        """A slice over all active rows; valid until a row is added."""
        return self.rows(0, self.num_active)


class CacheSlice:
    """Rows that one forward reads and extends.

    The forward writes the new tokens' keys and values; `advance` then counts them as stored.

    Args:
        tables: pages of each row.
        starts: tokens stored in each.
        cache, first_row: whose rows these are, if any's.
        one_by_one: new tokens attend as if each had come by itself.

    Attributes:
        max_start: of the row with the most tokens.
    """

    def __init__(
        self,
        pool: KVPool,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        cache: KVCache | None = None,
        first_row: int = 0,
        one_by_one: bool = False,
    ) -> None:
        self._pool, self._cache, self._first_row = pool, cache, first_row
        self.one_by_one = one_by_one
        self.starts = list(starts)
        self.max_start = max(self.starts, default=0)
        self.device, self.keeps_blocks = pool.device, pool.keeps_blocks
        self.starts_R = torch.tensor(self.starts, dtype=torch.long, device=self.device)
        longest = max(map(len, tables), default=0)
        padded = [[*table, *[pool.num_pages] * (longest - len(table))] for table in tables]
        self._room = longest * BLOCK if cache is None else cache.max_tokens
        self._host_RC = torch.tensor(padded, dtype=torch.int32).view(len(padded), longest)
        self._pages_RC = self._host_RC.to(self.device, torch.long)

    def check_room(self, tokens: int) -> int:
        """Tokens of the longest row with `tokens` new ones.

        Raises:
            ShapeError: they do not fit into its pages; other rows may be padded beyond theirs.
        """
        num_tokens = self.max_start + tokens
        if num_tokens > self._room:
            raise ShapeError(f"{num_tokens} tokens do not fit into a cache of {self._room}")
        return num_tokens

    def buffers(self) -> CacheBuffers:
        """Where the rows lie, in every layer."""
        pool = self._pool
        scales = (pool._key_scales, pool._value_scales) if pool.is_int8 else ()
        return CacheBuffers(pool._keys, pool._values, scales, pool._block_keys, self._host_RC)

    def write(
        self, layer: int, k_RKTH: Tensor, v_RKTH: Tensor, positions_RT: Tensor
    ) -> tuple[CachedStates, CachedStates]:
        """Store new keys and values at `positions`; returns copies [R, K, S, H] of all up to them.

        Raises:
            ShapeError: the new tokens do not fit.
        """
        pool = self._pool
        num_tokens = self.check_room(k_RKTH.shape[2])
        rows_R1 = torch.arange(len(self.starts), device=self.device)[:, None]
        pages_RT = self._pages_RC[rows_R1, positions_RT // BLOCK]
        within_RT = positions_RT % BLOCK
        used_RC = self._pages_RC[:, : count_pages(num_tokens)]

        def store(buffer: Tensor, new_RKT_: Tensor) -> Tensor:
            """Keys or values, or their scales."""
            of_layer = buffer[layer]
            of_layer[:, pages_RT, within_RT] = new_RKT_.transpose(0, 1).to(buffer.dtype)
            blocks_KRC_ = of_layer[:, used_RC]
            return blocks_KRC_.transpose(0, 1).flatten(2, 3)[:, :, :num_tokens]

        if not pool.is_int8:
            return CachedStates(store(pool._keys, k_RKTH)), CachedStates(
                store(pool._values, v_RKTH)
            )
        (k, k_scale), (v, v_scale) = quantize_states(k_RKTH), quantize_states(v_RKTH)
        return (
            CachedStates(store(pool._keys, k), store(pool._key_scales, k_scale)),
            CachedStates(store(pool._values, v), store(pool._value_scales, v_scale)),
        )

    def advance(self, counts: list[int]) -> None:
        """Count the first `counts[r]` of the tokens just written as stored in row r."""
        assert self._cache is not None, "rows of a cache advance; who has pages counts itself"
        for offset, count in enumerate(counts):
            self._cache.lengths[self._first_row + offset] += count

    def write_blocks(self, layer: int, row: int, blocks: slice, summaries_KCX: Tensor) -> None:
        """Keep the summaries of some blocks of row `row` of the slice."""
        pages_C = self._pages_RC[row, blocks]
        self._pool._block_keys[layer][:, pages_C] = summaries_KCX

    def read_blocks(self, layer: int, count: int) -> Tensor:
        """Summaries of the first `count` blocks, if a row has as many: [R, K, C, X]."""
        return self._pool._block_keys[layer][:, self._pages_RC[:, :count]].transpose(0, 1)
