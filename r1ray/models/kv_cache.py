"""Keys and values of the sequences being decoded, in rows of one preallocated buffer per layer.

Rows [0, num_active) are in use: removing one moves the last active row into its place, so that a
decode step always works on a contiguous slice. A row costs 2·layers·K·max_tokens·H elements.

Shape legend: R rows, K key/value heads, S cached tokens, T new tokens, H head dimension.
"""

import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.models.config import ModelConfig
from r1ray.ops.block_sparse import BLOCK

__all__ = ["CacheSlice", "KVCache", "cache_bytes"]


def cache_bytes(
    config: ModelConfig,
    *,
    max_rows: int,
    max_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Size of a `KVCache` of this shape."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * max_rows * max_tokens * dtype.itemsize


class KVCache:
    """Buffers for `max_rows` sequences of up to `max_tokens` tokens.

    Args:
        keeps_blocks: also keep one summary of each block of keys (`r1ray.models.sparse`).

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
        keeps_blocks: bool = False,
    ) -> None:
        shape = (config.num_layers, max_rows, config.num_kv_heads, max_tokens, config.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0 and must not hold NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.keeps_blocks = keeps_blocks
        blocks = (*shape[:3], max_tokens // BLOCK if keeps_blocks else 0, config.head_dim)
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
            self._keys[:, row, :, :used] = self._keys[:, last, :, :used]
            self._values[:, row, :, :used] = self._values[:, last, :, :used]
            self._block_keys[:, row] = self._block_keys[:, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        return last


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

    def write(
        self, layer: int, k_RKTH: Tensor, v_RKTH: Tensor, positions_RT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values at `positions`; returns views [R, K, S, H] of all up to them.

        Raises:
            ShapeError: the new tokens do not fit into `max_tokens`.
        """
        num_tokens = self.max_start + k_RKTH.shape[2]
        if num_tokens > self._cache.max_tokens:
            raise ShapeError(
                f"{num_tokens} tokens do not fit into a cache of {self._cache.max_tokens}"
            )
        keys = self._cache._keys[layer, self._rows, :, :num_tokens]
        values = self._cache._values[layer, self._rows, :, :num_tokens]
        if self.max_start == 0:
            keys.copy_(k_RKTH)
            values.copy_(v_RKTH)
        else:
            rows_R1 = torch.arange(len(positions_RT), device=keys.device)[:, None]
            keys[rows_R1, :, positions_RT] = k_RKTH.transpose(1, 2).to(keys.dtype)
            values[rows_R1, :, positions_RT] = v_RKTH.transpose(1, 2).to(values.dtype)
        return keys, values

    def advance(self, counts: list[int]) -> None:
        """Count the first `counts[r]` of the tokens just written as stored in row r."""
        for offset, count in enumerate(counts):
            self._cache.lengths[self._rows.start + offset] += count

    def write_blocks(self, layer: int, row: int, blocks: slice, summaries_KCH: Tensor) -> None:
        """Keep the summaries of some blocks of row `row` of the slice."""
        self._cache._block_keys[layer, self._rows.start + row, :, blocks] = summaries_KCH

    def read_blocks(self, layer: int, count: int) -> Tensor:
        """Summaries of the first `count` blocks, if a row has as many: a view [R, K, C, H]."""
        return self._cache._block_keys[layer, self._rows, :, :count]
