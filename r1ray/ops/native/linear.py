"""The native INT8 linear layer: checks, and the call of `int8_linear.cpp`."""

import torch
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.native.library import best_isa, library

__all__ = ["MAX_INPUTS", "int8_linear"]

MAX_INPUTS = 65_536  # so that no sum of int8 products leaves int32


def int8_linear(
    x_MI: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None = None,
    *,
    isa: int | None = None,
) -> Tensor:
    """As `r1ray.ops.int8.int8_linear`, bit for bit, on the CPU: float32 [M, O].

    Args:
        x_MI: of any float dtype.
        isa: index in `ISA_NAMES`, at most `best_isa()`; None for that one.
    """
    x_MI, weight_OI = x_MI.float().contiguous(), weight_OI.contiguous()
    scale_O = scale_O.float().contiguous()
    bias = None if bias_O is None else bias_O.float().contiguous()
    (tokens, inner), outer = x_MI.shape, weight_OI.shape[0]
    _check(x_MI, weight_OI, scale_O, bias)
    out_MO = torch.empty(tokens, outer, dtype=torch.float32, device="cpu")
    failed = library().r1ray_int8_linear(
        x_MI.data_ptr(),
        tokens,
        inner,
        weight_OI.data_ptr(),
        scale_O.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outer,
        out_MO.data_ptr(),
        best_isa() if isa is None else isa,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {tokens} x {inner} quantized activations")
    return out_MO


def _check(x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
    """The kernel takes addresses: what does not fit would be read beyond its end."""
    outer = weight_OI.shape[0]
    vectors = [scale_O] if bias_O is None else [scale_O, bias_O]
    if (
        weight_OI.dtype != torch.int8
        or any(vector.shape != (outer,) for vector in vectors)
        or any(item.device.type != "cpu" for item in (x_MI, weight_OI, *vectors))
    ):
        raise ShapeError(
            f"int8_linear: weight {weight_OI.dtype} {tuple(weight_OI.shape)} on "
            f"{weight_OI.device}, scale {tuple(scale_O.shape)} and bias "
            f"{None if bias_O is None else tuple(bias_O.shape)} do not belong together"
        )
