"""Keys or values as a cache holds them: floating point, or int8 with a scale a token and group.

Price: int8 takes H + 4 bytes a token and group instead of 4·H, and one rounding to 1/254 of a
token's largest element; reading multiplies by the scale.

Shape legend: B rows, K key/value groups, S tokens, H head dimension, C whole blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r1ray.ops.int8 import row_scale

__all__ = ["CachedStates", "quantize_states"]


@dataclass(frozen=True)
class CachedStates:
    """Keys or values [B, K, S, H], of which `states[index]` reads some in floating point.

    Attributes:
        data_BKSH: floating point; or int8, and then times the scale.
        scale_BKS: float32 with int8, else None.
    """

    data_BKSH: Tensor
    scale_BKS: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.data_BKSH.shape

    def __getitem__(self, index: Any) -> Tensor:
        """What `index`, of all dimensions but the last, picks: a view, or a copy out of int8."""
        picked = self.data_BKSH[index]
        if self.scale_BKS is None:
            return picked
        return picked.to(torch.float32) * self.scale_BKS[index][..., None]

    def floats(self) -> Tensor:
        """All of them [B, K, S, H]."""
        return self[...]

    def row(self, row: int) -> "CachedStates":
        """[1, K, S, H] of one row."""
        one = slice(row, row + 1)
        return CachedStates(
            self.data_BKSH[one], None if self.scale_BKS is None else self.scale_BKS[one]
        )

    def group(self, group: int) -> "CachedStates":
        """[B, 1, S, H] of one group."""
        one = (slice(None), slice(group, group + 1))
        return CachedStates(
            self.data_BKSH[one], None if self.scale_BKS is None else self.scale_BKS[one]
        )

    def in_blocks(self, tokens: int) -> "CachedStates":
        """Whole blocks of so many tokens: [B, K, C, tokens, H]."""
        whole = self.shape[2] // tokens * tokens
        data = self.data_BKSH[:, :, :whole].unflatten(2, (-1, tokens))
        if self.scale_BKS is None:
            return CachedStates(data)
        return CachedStates(data, self.scale_BKS[:, :, :whole].unflatten(2, (-1, tokens)))


def quantize_states(x_BKSH: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 in [-127, 127], float32 scales [B, K, S]): each token of a group by its largest."""
    scale_BKS1 = row_scale(x_BKSH, 127)
    data = (x_BKSH.float() / scale_BKS1).round().clamp(-127, 127).to(torch.int8)
    return data, scale_BKS1.squeeze(-1)
