"""Linear layers and embeddings that train through the rounding that they are served with.

1. Weights (per output channel) and activations (per token) are rounded to integers, with the
   ranges of `r1ray.ops.int8`: the largest magnitude of a row, which moves as the weights do.
2. The product is that of the integers, in whatever format the matrix products of training run in.
   Integers up to 127 are exact in bf16, fp16 and fp32, so the fake-quant model is the served one,
   up to the rounding of sums. They carry a factor of 1/128, lest sums overflow in fp16.
3. Gradients pass the rounding as if it were not there (straight-through).

Price: about four passes over every weight and activation a forward; no state of its own, so a
checkpoint stays a plain Hugging Face one.

Source: Jacob et al. 2018, arXiv:1712.05877; straight-through: Bengio et al. 2013, arXiv:1308.3432.

Shape legend: I input features, O output features, D hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1ray.ops.int8 import row_scale

__all__ = ["FakeQuantEmbedding", "FakeQuantLinear", "fake_quant_linear", "held_weights"]

_UNIT = 2.0**-7  # what one integer step counts in products
_ACTIVATION_LIMIT = 127


class _StraightThrough(torch.autograd.Function):
    """Integers of x / scale times `_UNIT`; the gradient is that of x / scale · `_UNIT`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, limit: int) -> Tensor:
        ctx.save_for_backward(scale)
        return (x / scale).round_().clamp_(-limit, limit).mul_(_UNIT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] / scale * _UNIT, None, None


def fake_quant_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, weight_limit: int = 127
) -> Tensor:
    """x @ weightᵀ + bias with both rounded as they are served: [..., O].

    Args:
        x: float [..., I].
        weight_limit: largest integer of a weight: 127 for int8, 7 for int4.
    Returns:
        In the dtype of autocast, where it is on; else in x's.
    """
    return _multiply(x, *_round_weight(weight_OI, weight_limit), bias_O)


def _round_weight(weight_OI: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(integers times `_UNIT` [O, I], scale [O, 1])."""
    weight_OI = weight_OI.float()
    scale_O1 = row_scale(weight_OI.detach(), limit)
    return _integers(weight_OI, scale_O1, limit), scale_O1


def _multiply(x: Tensor, q_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    wide = x.float()
    scale_x = row_scale(wide.detach(), _ACTIVATION_LIMIT)
    product = F.linear(_integers(wide, scale_x, _ACTIVATION_LIMIT), q_OI)
    out = product.float() * (scale_x / _UNIT) * (scale_O1.squeeze(-1) / _UNIT)
    if bias_O is not None:
        out = out + bias_O
    return out.to(x.dtype if product.dtype == torch.float32 else product.dtype)


class FakeQuantLinear(nn.Linear):
    """`nn.Linear` that is served as `Int8Linear`.

    Attributes:
        weight_limit: largest integer of a weight: 127 for int8, 7 for int4.
    """

    weight_limit: int
    _held: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_float(cls, linear: nn.Linear, weight_limit: int = 127) -> "FakeQuantLinear":
        """`linear` itself, of this class: the same parameters."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.weight_limit = weight_limit
        return linear

    def forward(self, x: Tensor) -> Tensor:
        if self._held is None:
            return fake_quant_linear(x, self.weight, self.bias, weight_limit=self.weight_limit)
        return _multiply(x, *self._held, self.bias)


@contextlib.contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Round every weight of `model` once, for many forwards without gradients in between.

    The weights must not change meanwhile. Price: a float32 copy of them.
    """
    layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    try:
        with torch.no_grad():
            for layer in layers:
                layer._held = _round_weight(layer.weight, layer.weight_limit)
        yield
    finally:
        for layer in layers:
            layer._held = None


class FakeQuantEmbedding(nn.Embedding):
    """`nn.Embedding` that is served as `Int8Embedding`."""

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> "FakeQuantEmbedding":
        """`embedding` itself, of this class: the same parameter."""
        embedding.__class__ = cls
        assert isinstance(embedding, cls)
        return embedding

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        scale = row_scale(rows.detach(), _ACTIVATION_LIMIT)
        return _integers(rows, scale, _ACTIVATION_LIMIT) * (scale / _UNIT)


def _integers(x: Tensor, scale: Tensor, limit: int) -> Tensor:
    out: Tensor = _StraightThrough.apply(x, scale, limit)
    return out
