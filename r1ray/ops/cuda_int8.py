"""`int8_linear` on CUDA in two kernels: rounding of a row, and the product with its scales.

1. One program a row finds the largest magnitude and writes the integers.
2. The product adds up in int32 on the tensor cores; scales and bias are applied before the only
   store. Tiles have at least 16 rows, so decoding wastes arithmetic and no memory traffic.

Price: two launches, the input read twice and written once in int8. In plain torch it would be about
twelve launches, which is several times slower at any size.

Triton comes with torch's CUDA builds; where it is missing, `r1ray.ops.int8` runs instead.

Shape legend: M tokens, I input features, O output features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_INPUTS", "int8_linear"]

MAX_INPUTS = 65_536  # a row is rounded by one program, in registers
_ROUNDING = tl.constexpr(12_582_912.0)  # 1.5 * 2^23: what is added to it becomes whole, to even


@triton.jit
def _round_rows(x_ptr, q_ptr, scale_ptr, inputs, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    is_inside = columns < inputs
    x = tl.load(x_ptr + row * inputs + columns, mask=is_inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    num_nan = tl.sum((x != x).to(tl.int32), 0)
    scale = tl.where(num_nan > 0, float("nan"), scale)
    quotient = tl.minimum(tl.maximum(tl.div_rn(x, scale), -127.0), 127.0)
    whole = (quotient + _ROUNDING) - _ROUNDING
    tl.store(q_ptr + row * inputs + columns, whole.to(tl.int8), mask=is_inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    q_ptr,
    weight_ptr,
    scale_m_ptr,
    scale_o_ptr,
    bias_ptr,
    out_ptr,
    rows,
    outputs,
    inputs,
    has_bias: tl.constexpr,
    block_m: tl.constexpr,
    block_o: tl.constexpr,
    block_i: tl.constexpr,
):
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    o = tl.program_id(1) * block_o + tl.arange(0, block_o)
    is_row, is_output = m < rows, o < outputs
    m_long, o_long = m.to(tl.int64), o.to(tl.int64)
    total = tl.zeros((block_m, block_o), dtype=tl.int32)
    for start in range(0, inputs, block_i):
        i = start + tl.arange(0, block_i)
        is_input = i < inputs
        q = tl.load(
            q_ptr + m_long[:, None] * inputs + i[None, :],
            mask=is_row[:, None] & is_input[None, :],
            other=0,
        )
        weight = tl.load(
            weight_ptr + o_long[None, :] * inputs + i[:, None],
            mask=is_output[None, :] & is_input[:, None],
            other=0,
        )
        total = tl.dot(q, weight, total, out_dtype=tl.int32)
    scale_m = tl.load(scale_m_ptr + m, mask=is_row, other=0.0)
    scale_o = tl.load(scale_o_ptr + o, mask=is_output, other=0.0)
    out = total.to(tl.float32) * scale_m[:, None] * scale_o[None, :]
    if has_bias:
        out += tl.load(bias_ptr + o, mask=is_output, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + m_long[:, None] * outputs + o[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_output[None, :],
    )


def int8_linear(
    x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """As `r1ray.ops.int8.int8_linear`, for tensors on one CUDA device and I <= MAX_INPUTS."""
    rows, inputs, outputs = *x_MI.shape, len(weight_OI)
    x_MI, weight_OI = x_MI.contiguous(), weight_OI.contiguous()
    q_MI = torch.empty(x_MI.shape, dtype=torch.int8, device=x_MI.device)
    scale_M = torch.empty(rows, dtype=torch.float32, device=x_MI.device)
    out_MO = torch.empty(rows, outputs, dtype=x_MI.dtype, device=x_MI.device)
    if out_MO.numel() == 0:
        return out_MO
    block = triton.next_power_of_2(inputs)
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_o = 128 if block_m >= 64 else 32
    grid = (triton.cdiv(rows, block_m), triton.cdiv(outputs, block_o))
    with torch.cuda.device_of(x_MI):
        _round_rows[(rows,)](
            x_MI, q_MI, scale_M, inputs, block=block, num_warps=max(1, min(8, block // 512))
        )
        _multiply[grid](
            q_MI,
            weight_OI,
            scale_M,
            scale_O,
            scale_O if bias_O is None else bias_O,
            out_MO,
            rows,
            outputs,
            inputs,
            has_bias=bias_O is not None,
            block_m=block_m,
            block_o=block_o,
            block_i=64 if block_m >= 64 else 128,
            num_warps=8 if block_m == 128 else 4,
            num_stages=3,
        )
    return out_MO
