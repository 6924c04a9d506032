"""Keys and values of the sequences being decoded, in rows of one preallocated buffer per layer.

Rows [0, num_active) are in use: removing one moves the last active row into its place, so that a
decode step always works on a contiguous slice. A row costs 2·layers·K·max_tokens·H elements; in
int8, each token and group has a float32 scale beside its H bytes.

Shape legend: R rows, K key/value heads, S cached tokens, T new tokens, H head dimension, C blocks,
X size of a block's summary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models.config import ModelConfig
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.cached_states import CachedStates, quantize_states

__all__ = ["CacheBuffers", "CacheSlice", "KVCache", "cache_bytes"]


def cache_bytes(
    config: ModelConfig,
    *,
    max_rows: int,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Size of a `KVCache` of this shape."""
    states = 2 * config.num_layers * config.num_kv_heads * max_rows * max_tokens
    scale_bytes = torch.float32.itemsize if dtype == torch.int8 else 0
    return states * (config.head_dim * dtype.itemsize + scale_bytes)


class KVCache:
    """Buffers for `max_rows` sequences of up to `max_tokens` tokens.

    Args:
        dtype: a floating point one, or int8.
        summary_size: floats of each summary of a block of keys (`r1ray.models.sparse`), if any are
            kept.

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
        shape = (config.num_layers, max_rows, config.num_kv_heads, max_tokens, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0 and must not hold NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        scales = shape[:-1] if dtype == torch.int8 else (0,)
        self._key_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self._value_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self.is_int8, self.keeps_blocks = dtype == torch.int8, summary_size > 0
        blocks = (*shape[:3], max_tokens // BLOCK if summary_size else 0, summary_size)
        self._block_keys = torch.zeros(blocks, dtype=torch.float32, device=device)
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
        return CacheSlice(self, first, count)

    def rows(self, first: int, count: int) -> "CacheSlice":
        """A slice over `count` active rows; valid until a row is added or removed."""
        return CacheSlice(self, first, count)

    def active(self) -> "CacheSlice":
        """A slice over all active rows; valid until a row is added or removed."""
        return CacheSlice(self, 0, self.num_active)

    def remove_row(self, row: int) -> int:
        """Free `row`; the last active row moves there. Returns that row's former index."""
        last = self.num_active - 1
        if row != last:
            used = self.lengths[last]
            for states in (self._keys, self._values):
                states[:, row, :, :used] = states[:, last, :, :used]
            if self.is_int8:
                for scales in (self._key_scales, self._value_scales):
                    scales[:, row, :, :used] = scales[:, last, :, :used]
            self._block_keys[:, row] = self._block_keys[:, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last


class CacheBuffers(NamedTuple):
    """Views of some rows of a cache's buffers, for kernels that read and write them in place.

    Attributes:
        keys, values: [layers, R, K, max_tokens, H].
        scales: those of int8 keys and of values, each [layers, R, K, max_tokens]; else none.
        block_keys: summaries [layers, R, K, max_tokens // 64, X]; of no blocks where none are kept.
    """

    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, ...]
    block_keys: Tensor


class CacheSlice:
    """A run of rows that one forward reads and extends.

    The forward writes the new tokens' keys and values; `advance` then counts them as stored.
    """

    def __init__(self, cache: KVCache, first: int, count: int) -> None:
        self._cache = cache
        self._rows = slice(first, first + count)
        self.starts = cache.lengths[self._rows]
        self.max_start = max(self.starts, default=0)
        self.device, self.keeps_blocks = cache._keys.device, cache.keeps_blocks
        self.starts_R = torch.tensor(self.starts, dtype=torch.long, device=self.device)

    def check_room(self, tokens: int) -> int:
        """Tokens of the longest row with `tokens` new ones.

        Raises:
            ShapeError: they do not fit into `max_tokens`.
        """
        num_tokens = self.max_start + tokens
        if num_tokens > self._cache.max_tokens:
            raise ShapeError(
                f"{num_tokens} tokens do not fit into a cache of {self._cache.max_tokens}"
            )
        return num_tokens

    def buffers(self) -> "CacheBuffers":
        """Where the rows of the slice lie, in every layer."""
        cache, rows = self._cache, self._rows
        scales = (cache._key_scales, cache._value_scales) if cache.is_int8 else ()
        return CacheBuffers(
            cache._keys[:, rows],
            cache._values[:, rows],
            tuple([scale[:, rows] for scale in scales]),
            cache._block_keys[:, rows],
        )

    def write(
        self, layer: int, k_RKTH: Tensor, v_RKTH: Tensor, positions_RT: Tensor
    ) -> tuple[CachedStates, CachedStates]:
        """Store new keys and values at `positions`; returns views [R, K, S, H] of all up to them.

        Raises:
            ShapeError: the new tokens do not fit into `max_tokens`.
        """
        cache = self._cache
        num_tokens = self.check_room(k_RKTH.shape[2])

        def store(buffer: Tensor, new_RKT_: Tensor) -> Tensor:
            """Keys or values, or their scales."""
            view = buffer[layer, self._rows, :, :num_tokens]
            if self.max_start == 0:
                view.copy_(new_RKT_)
            else:
                rows_R1 = torch.arange(len(positions_RT), device=view.device)[:, None]
                view[rows_R1, :, positions_RT] = new_RKT_.transpose(1, 2).to(view.dtype)
            return view

        if not cache.is_int8:
            return CachedStates(store(cache._keys, k_RKTH)), CachedStates(
                store(cache._values, v_RKTH)
            )
        (k, k_scale), (v, v_scale) = quantize_states(k_RKTH), quantize_states(v_RKTH)
        return (
            CachedStates(store(cache._keys, k), store(cache._key_scales, k_scale)),
            CachedStates(store(cache._values, v), store(cache._value_scales, v_scale)),
        )

    def advance(self, counts: list[int]) -> None:
        """Count the first `counts[r]` of the tokens just written as stored in row r."""
        for offset, count in enumerate(counts):
            self._cache.lengths[self._rows.start + offset] += count

    def write_blocks(self, layer: int, row: int, blocks: slice, summaries_KCX: Tensor) -> None:
        """Keep the summaries of some blocks of row `row` of the slice."""
        self._cache._block_keys[layer, self._rows.start + row, :, blocks] = summaries_KCX

    def read_blocks(self, layer: int, count: int) -> Tensor:
        """Summaries of the first `count` blocks, if a row has as many: a view [R, K, C, X]."""
        return self._cache._block_keys[layer, self._rows, :, :count]
