"""The best uniform 4-bit weights of a given size: what codebooks are measured against.

Groups of a row share a float16 scale, or a scale and an offset; the range of each group is clipped
to the smallest squared error. The same outliers are kept as in the codebooks, at the same price.
"""

import math

import torch
from torch import Tensor

__all__ = ["best_uniform", "group_size_for"]

_CLIPS = torch.linspace(0.4, 1.0, 25)


def group_size_for(spare_bits: float, num_columns: int, bits_per_group: int) -> int:
    """Columns of a group, such that groups take at least `spare_bits` a weight.

    The baseline is rounded up in its favour.
    """
    num_groups = min(num_columns, math.ceil(spare_bits * num_columns / bits_per_group))
    return num_columns // max(1, num_groups)


def best_uniform(
    weight_OI: Tensor, is_outlier_OI: Tensor, spare_bits: float
) -> dict[str, tuple[Tensor, float]]:
    """From `symmetric`, `asymmetric` -> (decoded weights, bits a weight without outliers).

    Args:
        spare_bits: what there is beside 4 bits a weight for scales and offsets.
    """
    found = {}
    for kind, bits_per_group in (("symmetric", 16), ("asymmetric", 32)):
        size = group_size_for(spare_bits, weight_OI.shape[1], bits_per_group)
        decoded = torch.cat(
            [
                _quantize(group, mask, is_symmetric=kind == "symmetric")
                for group, mask in zip(
                    weight_OI.split(size, dim=1), is_outlier_OI.split(size, dim=1), strict=True
                )
            ],
            dim=1,
        )
        num_groups = -(-weight_OI.shape[1] // size)
        found[kind] = (decoded, 4 + bits_per_group * num_groups / weight_OI.shape[1])
    return found


def _quantize(group_OI: Tensor, is_outlier_OI: Tensor, *, is_symmetric: bool) -> Tensor:
    """The group's weights rounded to 16 levels, but for the outliers."""
    inside_OI = group_OI.masked_fill(is_outlier_OI, 0.0)
    low_O1 = inside_OI.amin(1, keepdim=True)
    high_O1 = inside_OI.amax(1, keepdim=True)
    best_OI, error_O1 = inside_OI, torch.full_like(low_O1, torch.inf)
    for clip in _CLIPS:
        if is_symmetric:
            scale_O1 = (torch.maximum(-low_O1, high_O1) * clip / 7.5).half().float()
            offset_O1 = torch.zeros_like(scale_O1)
            bounds = (-8, 7)
        else:
            middle_O1, half_O1 = (low_O1 + high_O1) / 2, (high_O1 - low_O1) / 2 * clip
            scale_O1 = (2 * half_O1 / 15).half().float()
            offset_O1 = (middle_O1 - half_O1).half().float()
            bounds = (0, 15)
        scale_O1 = torch.where(scale_O1 == 0, torch.ones_like(scale_O1), scale_O1)
        steps_OI = ((inside_OI - offset_O1) / scale_O1).round().clamp(*bounds)
        decoded_OI = steps_OI * scale_O1 + offset_O1
        missed_OI = (decoded_OI - inside_OI).masked_fill(is_outlier_OI, 0.0)
        missed_O1 = missed_OI.square().sum(1, keepdim=True)
        best_OI = torch.where(missed_O1 < error_O1, decoded_OI, best_OI)
        error_O1 = torch.minimum(error_O1, missed_O1)
    return torch.where(is_outlier_OI, group_OI, best_OI)
