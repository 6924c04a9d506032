"""Causal attention against its definition, and its number format under autocast."""

import pytest
import torch

from r1ray.ops.causal_attention import causal_attention


def _attend_by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    tokens = q.shape[2]
    is_later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(is_later, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_it_equals_its_definition(tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 6, tokens, 8),
        torch.randn(2, 2, tokens, 8),
        torch.randn(2, 2, tokens, 8),
    )
    expected = _attend_by_definition(q, k, v)
    torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_cpu_attends_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8).to(dtype).requires_grad_() for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        out = causal_attention(q, k, v)
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype == torch.float32
    expected = _attend_by_definition(q.float(), k.float(), v.float())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert v.grad is not None
    assert v.grad.dtype == dtype
