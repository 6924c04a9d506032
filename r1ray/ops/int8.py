"""INT8 weights and activations: quantizers, the integer linear operator, and the modules around it.

1. Weights: symmetric int8 per output channel, once, at export.
2. Activations: symmetric int8 per token, at run time.
3. The product of the two integer matrices is exact; one multiplication by both scales follows.

Price: 1/4 of the bytes of fp32. On a CPU all three steps are one native kernel (`ops.native`),
where it was built. Else the product is `torch._int_mm` if the processor has int8 dot products
(VNNI); elsewhere torch's integer product is 20-60x slower than its float one, so the integers are
multiplied as float32: exact while sums stay below 2^24, which needs in_features <= 1040 in the
worst case, and off by less than one part in 10^7 beyond. On CUDA all is two Triton kernels
(`ops.cuda_int8`).

Shape legend: M tokens, I input features, O output features, V vocabulary, D hidden size.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

from r1ray.errors import ShapeError
from r1ray.ops import native

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "int8_linear",
    "quantize_int8",
    "row_scale",
    "torch_int8_linear",
]


def row_scale(x: Tensor, limit: int) -> Tensor:
    """Size of an integer step by which the largest of a row becomes `limit`: float32 [..., 1] > 0.

    1 where a row is zero throughout; not finite where a row is not.
    """
    scale = x.float().abs().amax(dim=-1, keepdim=True) / float(limit)
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN stays NaN


def quantize_int8(w_OI: Tensor, limit: int = 127) -> tuple[Tensor, Tensor]:
    """Symmetric per-row INT8: w ~= q * scale[:, None].

    Args:
        w_OI: float [out, in]; rows may be all zero.
        limit: largest integer used: 127, or 7 for weights that fit 4 bits.
    Returns:
        (q_OI int8 in [-limit, limit], scale_O float32 > 0; not finite where a row is not).
    Raises:
        ShapeError: w_OI is not 2-D.
    Source: Jacob et al. 2018, arXiv:1712.05877. -128 is unused, to keep symmetry.
    """
    if w_OI.dim() != 2:
        raise ShapeError(f"quantize_int8 takes a matrix, got shape {tuple(w_OI.shape)}")
    scale_O1 = row_scale(w_OI, limit)
    q_OI = (w_OI.float() / scale_O1).round().clamp(-limit, limit).to(torch.int8)
    return q_OI, scale_O1.squeeze(1)


def int8_linear(
    x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """x @ (weight * scale)ᵀ + bias with x quantized per token: [M, O] in x's dtype.

    Args:
        x_MI: float [tokens, in].
        weight_OI: int8 [out, in]; scale_O: float32 [out].
    Raises:
        ShapeError: the inner sizes differ.
    """
    if x_MI.dim() != 2 or x_MI.shape[1] != weight_OI.shape[1]:
        raise ShapeError(
            f"int8_linear: input {tuple(x_MI.shape)} does not fit weight {tuple(weight_OI.shape)}"
        )
    is_native = x_MI.device.type == "cpu" and native.is_available()
    if is_native and x_MI.shape[1] <= native.MAX_INPUTS:
        return native.int8_linear(x_MI, weight_OI, scale_O, bias_O).to(x_MI.dtype)
    if x_MI.is_cuda and (kernels := _cuda_kernels()) and x_MI.shape[1] <= kernels.MAX_INPUTS:
        return kernels.int8_linear(x_MI, weight_OI, scale_O, bias_O)
    return torch_int8_linear(x_MI, weight_OI, scale_O, bias_O)


def torch_int8_linear(
    x_MI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """`int8_linear` without native kernels; the two agree bit for bit where products are exact."""
    q_MI, scale_M = quantize_int8(x_MI)
    product_MO = _integer_product(q_MI, weight_OI)
    out_MO = product_MO * scale_M[:, None] * scale_O
    if bias_O is not None:
        out_MO = out_MO + bias_O
    return out_MO.to(x_MI.dtype)


def _integer_product(q_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """q @ weightᵀ of int8 matrices, as float32 [M, O]."""
    if q_MI.is_cuda:
        return _cuda_product(q_MI, weight_OI)
    if _has_vnni() and q_MI.shape[1] > 1:  # of one column it returns zeros (torch 2.13)
        return torch._int_mm(q_MI, weight_OI.t()).float()
    return q_MI.float() @ weight_OI.float().t()


def _cuda_product(q_MI: Tensor, weight_OI: Tensor) -> Tensor:
    """CUDA's kernel wants more than 16 rows, and multiples of 8 elsewhere: zeros fill them up."""
    rows, inner, outer = *q_MI.shape, weight_OI.shape[0]
    q_MI = nn.functional.pad(q_MI, (0, -inner % 8, 0, max(0, 17 - rows)))
    weight_OI = nn.functional.pad(weight_OI, (0, -inner % 8, 0, -outer % 8))
    return torch._int_mm(q_MI, weight_OI.t())[:rows, :outer].float()


@functools.cache
def _cuda_kernels() -> ModuleType | None:
    """`r1ray.ops.cuda_int8`, where Triton is installed."""
    try:
        return importlib.import_module("r1ray.ops.cuda_int8")
    except ImportError:
        return None


@functools.cache
def _has_vnni() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


class Int8Linear(nn.Module):
    """`nn.Linear` with an int8 weight and dynamic int8 activations. Inference only."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI)
        self.register_buffer("weight_scale", scale_O)
        self.register_buffer("bias", bias_O)

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_limit: int = 127) -> "Int8Linear":
        weight_OI, scale_O = quantize_int8(linear.weight.detach(), weight_limit)
        return cls(weight_OI, scale_O, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        out_MO = int8_linear(x.reshape(-1, x.shape[-1]), self.weight, self.weight_scale, self.bias)
        return out_MO.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """`nn.Embedding` with int8 rows, one scale each. Inference only."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight_VD: Tensor, scale_V: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VD)
        self.register_buffer("weight_scale", scale_V)

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> "Int8Embedding":
        return cls(*quantize_int8(embedding.weight.detach()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float() * self.weight_scale[ids][..., None]
