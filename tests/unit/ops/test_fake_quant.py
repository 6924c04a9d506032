import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1ray.ops.fake_quant import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    fake_quant_linear,
    held_weights,
)
from r1ray.ops.int8 import Int8Embedding, Int8Linear, quantize_int8


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("limit", [127, 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_fake_quant_layer_is_the_integer_layer(limit: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 33, bias=has_bias)
    served = Int8Linear.from_float(linear, limit)
    trained = FakeQuantLinear.from_float(linear, limit)
    x = _random(2, 5, 96)
    # Sums of 96 products in float32, against exact ones.
    torch.testing.assert_close(trained(x), served(x), rtol=1e-5, atol=1e-6)


def test_a_fake_quant_embedding_is_the_integer_embedding() -> None:
    embedding = nn.Embedding(20, 16)
    served = Int8Embedding.from_float(embedding)
    trained = FakeQuantEmbedding.from_float(embedding)
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(trained(ids), served(ids))


@pytest.mark.parametrize("limit", [127, 7])
def test_gradients_are_those_of_the_product_of_rounded_values(limit: int) -> None:
    x, weight, bias = _random(5, 24), _random(7, 24, seed=1), _random(7, seed=2)
    leaves = [item.clone().requires_grad_() for item in (x, weight, bias)]
    fake_quant_linear(*leaves, weight_limit=limit).square().sum().backward()
    rounded = []
    for value, largest in ((x, 127), (weight, limit)):
        q, scale = quantize_int8(value, largest)
        rounded.append((q * scale[:, None]).requires_grad_())
    expected = [*rounded, bias.clone().requires_grad_()]
    F.linear(*expected).square().sum().backward()
    for mine, theirs in zip(leaves, expected, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_multiply_exact_integers(dtype: torch.dtype) -> None:
    """Rounding x and weights to bf16 first would move some of them to the next integer."""
    x, weight = _random(4, 512), _random(16, 512, seed=1)
    with torch.autocast("cpu", dtype=dtype):
        narrow = fake_quant_linear(x, weight)
    wide = fake_quant_linear(x, weight)
    assert narrow.dtype == dtype
    # The sum is rounded to `dtype`, and then the scaled one.
    torch.testing.assert_close(narrow.float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_sums_of_the_largest_integers_fit_fp16() -> None:
    ones = torch.ones(1, 1536)
    with torch.autocast("cpu", dtype=torch.float16):
        assert fake_quant_linear(ones, ones).item() == pytest.approx(1536.0, rel=1e-3)


def test_zero_rows_and_weights_give_zeros_and_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    weight = torch.zeros(3, 8, requires_grad=True)
    out = fake_quant_linear(x, weight)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 3))
    for leaf in (x, weight):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


def test_held_weights_give_the_same_outputs_until_they_are_let_go() -> None:
    layer = FakeQuantLinear.from_float(nn.Linear(24, 7), 7)
    x = _random(3, 24)
    before = layer(x)
    with held_weights(nn.Sequential(layer)):
        assert torch.equal(layer(x), before)
        with torch.no_grad():
            layer.weight.mul_(2.0)
        assert torch.equal(layer(x), before)  # rounded once
    assert not torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_the_layer_keeps_its_parameters_and_the_inputs_dtype() -> None:
    linear = nn.Linear(8, 4)
    weight = linear.weight
    trained = FakeQuantLinear.from_float(linear)
    assert trained.weight is weight
    assert set(trained.state_dict()) == {"weight", "bias"}
    assert trained(_random(2, 8).bfloat16()).dtype == torch.bfloat16
