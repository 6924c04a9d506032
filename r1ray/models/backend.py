"""What continuous batching needs of whatever computes a model's logits, and the decoder as such.

A backend brings its own memory for keys and values, in pages of 64 tokens; which page belongs to
whom is the scheduler's to say. So all above it, from batching to grammars, is the same.

Shape legend: B rows, T new tokens, L tokens that something is to follow, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from r1ray.models.config import ModelConfig
from r1ray.models.decoder import Decoder
from r1ray.models.fusion import Fusion, ImageContext
from r1ray.models.kv_cache import CacheSlice, KVPool, page_bytes
from r1ray.models.native_layers import NativeLayers
from r1ray.ops.int8 import Int8Linear

__all__ = ["Backend", "DecoderBackend", "Pool"]


class Pool(Protocol):
    """Memory for pages, and one more that belongs to nobody, behind them.

    Attributes:
        num_pages: that sequences may have.
    """

    @property
    def num_pages(self) -> int: ...

    def slice(
        self, tables: Sequence[Sequence[int]], starts: Sequence[int], *, one_by_one: bool = False
    ) -> Any:
        """Rows whose blocks are in these pages, and that have so many tokens; for a backend."""


class Backend(Protocol):
    """Computes the next tokens' logits of rows that lie in a pool of its own.

    Attributes:
        config: of the model.
        fusion: what it sees images with; None where it reads text alone.
        is_sparse: attention chooses blocks of 64 tokens: pieces of prompts begin and end there.
        may_pad: rows may be padded on the right.
        page_bytes: memory of a page.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def fusion(self) -> Fusion | None: ...
    @property
    def is_sparse(self) -> bool: ...
    @property
    def may_pad(self) -> bool: ...
    @property
    def page_bytes(self) -> int: ...

    def build_pool(self, num_pages: int) -> Pool:
        """Memory for `num_pages` pages, and for one more."""

    def read(self, ids_BT: Tensor, rows: Any, images: ImageContext | None = None) -> None:
        """Store the keys and values of new tokens, int64 on the CPU.

        Args:
            images: that the rows see; None without `fusion`.
        """

    def next_logits(
        self,
        ids_BT: Tensor,
        rows: Any,
        last: Sequence[int],
        images: ImageContext | None = None,
    ) -> Tensor:
        """As `read`; and the logits [L, V] of what follows the tokens numbered `last` in [B · T]"""


class DecoderBackend:
    """Our own decoder, on the device that it is on; with native kernels where they fit.

    Args:
        model: must not be changed meanwhile.
        kv_dtype: of cached keys and values, a floating point one or int8; None for the weights'.
    """

    def __init__(self, model: Decoder, kv_dtype: torch.dtype | None = None) -> None:
        weight = model.model.norm.weight
        self._model, self._layers = model, NativeLayers.of(model)
        self._device, self._kv_dtype = weight.device, kv_dtype or weight.dtype
        self.config, self.fusion = model.config, model.fusion
        self.is_sparse = model.is_sparse
        # INT8 models say the same in any company: what of a prompt is a whole block would depend
        # on the padding.
        self.may_pad = not isinstance(model.lm_head, Int8Linear)

    @property
    def page_bytes(self) -> int:
        """Memory of a page, without a summary."""
        return page_bytes(self.config, self._kv_dtype)

    def build_pool(self, num_pages: int) -> KVPool:
        """As `Backend` has it."""
        return KVPool(
            self.config,
            num_pages,
            dtype=self._kv_dtype,
            device=self._device,
            summary_size=self._model.summary_size,
        )

    def read(self, ids_BT: Tensor, rows: CacheSlice, images: ImageContext | None = None) -> None:
        """As `Backend` has it."""
        self._model.hidden(ids_BT.to(self._device), rows, images=images)

    def next_logits(
        self,
        ids_BT: Tensor,
        rows: CacheSlice,
        last: Sequence[int],
        images: ImageContext | None = None,
    ) -> Tensor:
        """As `Backend` has it."""
        ids = ids_BT.to(self._device)
        return self._model.next_logits(ids, rows, last, self._layers, images)
