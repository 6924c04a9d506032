"""Two 4-bit codes in one byte: the first half of a row in the low bits, the second in the high.

Halves, and not neighbours, because whole registers are then shifted and joined.

Shape legend: E codes of a row.
"""

import torch
from torch import Tensor

__all__ = ["pack_nibbles", "unpack_nibbles"]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., ceil(E / 2)] of uint8 codes [..., E] from 0 to 15; a missing last one is 0."""
    length = -(-codes.shape[-1] // 2)
    low, high = codes[..., :length], codes[..., length:]
    if high.shape[-1] < length:
        high = torch.nn.functional.pad(high, (0, 1))
    return low | (high << 4)


def unpack_nibbles(packed: Tensor, num_codes: int) -> Tensor:
    """The `num_codes` codes of each row that `pack_nibbles` packed."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., :num_codes]
