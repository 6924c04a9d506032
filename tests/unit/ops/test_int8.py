import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from r1ray.errors import ShapeError
from r1ray.ops import int8
from r1ray.ops.int8 import (
    Int8Embedding,
    Int8Linear,
    int8_linear,
    quantize_int8,
    torch_int8_linear,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 40),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
)
def test_quantizing_errs_by_at_most_half_a_step(
    rows: int, columns: int, exponent: int, seed: int
) -> None:
    weight = _random(rows, columns, seed=seed) * 10.0**exponent
    q, scale = quantize_int8(weight)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert q.min() >= -127  # -128 is unused, to keep symmetry
    error = (weight - q * scale[:, None]).abs()
    # Half a step, plus the float32 rounding of 127 steps.
    assert torch.all(error <= scale[:, None] * (0.5 + 127 * 2**-23))
    largest = weight.abs().argmax(dim=1, keepdim=True)
    assert torch.all(q.gather(1, largest).abs() == 127)


def test_zero_rows_stay_zero_with_a_positive_scale() -> None:
    weight = _random(3, 5)
    weight[1] = 0.0
    q, scale = quantize_int8(weight)
    assert torch.all(scale > 0)
    assert torch.all(q[1] == 0)
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("value", [1e-44, 1e-40, 3e38])
def test_the_smallest_and_largest_floats_stay_finite(value: float) -> None:
    q, scale = quantize_int8(torch.tensor([[value, -value, 0.0]]))
    assert torch.all(scale > 0)
    assert torch.isfinite(q * scale[:, None]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_not_hidden(value: float) -> None:
    weight, scale = quantize_int8(_random(3, 4))
    x = _random(2, 4)
    x[1, 2] = value
    out = int8_linear(x, weight, scale)
    assert torch.isfinite(out[0]).all()
    assert not torch.isfinite(out[1]).any()


def test_bfloat16_weights_quantize_like_their_float32_values() -> None:
    weight = _random(4, 16).bfloat16()
    q, scale = quantize_int8(weight)
    q_wide, scale_wide = quantize_int8(weight.float())
    assert torch.equal(q, q_wide)
    assert torch.equal(scale, scale_wide)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_only_matrices_are_quantized(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="takes a matrix"):
        quantize_int8(torch.ones(shape))


@pytest.mark.parametrize("uses_int_mm", [False, True])
# Inner sizes around 1040, above which the float product may round, and single rows and columns.
@pytest.mark.parametrize(
    ("tokens", "inner", "outer"), [(1, 7, 5), (5, 1040, 8), (3, 4096, 16), (17, 64, 1), (2, 1, 3)]
)
def test_the_torch_path_equals_exact_integers(
    tokens: int, inner: int, outer: int, uses_int_mm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_has_vnni", lambda: uses_int_mm)
    x, bias = _random(tokens, inner), _random(outer, seed=2)
    weight, scale = quantize_int8(_random(outer, inner, seed=1))
    q_x, scale_x = quantize_int8(x)
    integers = (q_x.int()[:, None, :] * weight.int()[None]).sum(-1)  # exact in int32 and int64
    exact = integers.double() * scale_x[:, None].double() * scale.double() + bias.double()
    found = torch_int8_linear(x, weight, scale, bias)
    # Two float32 multiplications and one addition.
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_worst_case_sum_is_exact_up_to_1040_inputs() -> None:
    weight = torch.full((1, 1040), 127, dtype=torch.int8)
    q_x = torch.full((1, 1040), 127, dtype=torch.int8)
    assert int8._integer_product(q_x, weight).item() == 1040 * 127 * 127


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (4,)])
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    weight, scale = quantize_int8(_random(3, 4))
    with pytest.raises(ShapeError, match="does not fit weight"):
        int8_linear(torch.ones(shape), weight, scale)


def test_a_row_of_zeros_gives_the_bias() -> None:
    weight, scale = quantize_int8(_random(3, 4))
    bias = _random(3, seed=5)
    assert torch.equal(int8_linear(torch.zeros(1, 4), weight, scale, bias)[0], bias)


@pytest.mark.parametrize("has_bias", [False, True])
def test_an_int8_layer_stays_close_to_the_float_layer(has_bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=has_bias)
    x = _random(2, 9, 64)
    found = Int8Linear.from_float(linear)(x)
    assert found.shape == (2, 9, 32)
    # Weights and inputs rounded to 1/127 of their largest: errors average out over 64 products.
    assert (found - linear(x)).norm() / linear(x).norm() < 0.02


def test_the_output_keeps_the_inputs_dtype() -> None:
    weight, scale = quantize_int8(_random(3, 4))
    assert int8_linear(_random(2, 4).bfloat16(), weight, scale).dtype == torch.bfloat16


def test_an_int8_embedding_gives_its_rows_to_half_a_step() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 16)
    ids = torch.tensor([[3, 19], [0, 3]])
    found, exact = Int8Embedding.from_float(embedding)(ids), embedding(ids)
    bound = exact.abs().amax(-1, keepdim=True) / 127 * 0.5001  # and float32 rounding
    assert torch.all((found - exact).abs() <= bound)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    weight, scale = quantize_int8(_random(6, 8))
    x = _random(4, 8)
    together = int8_linear(x, weight, scale)
    x[1:] *= 1000.0
    assert torch.equal(int8_linear(x, weight, scale)[0], together[0])
