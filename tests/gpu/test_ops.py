"""Operators and codecs on CUDA give what they give on a CPU."""

import pytest
import torch

from r1ray.exchange.codecs import get_codec
from r1ray.ops.block_selection import BLOCK, choose_blocks
from r1ray.ops.block_sparse import block_sparse_attention, reference_attention
from r1ray.ops.cached_states import CachedStates, quantize_states
from r1ray.ops.causal_attention import cached_attention, causal_attention
from r1ray.ops.exact_choice import choose_exact
from r1ray.ops.fake_quant import fake_quant_linear
from r1ray.ops.int8 import int8_linear, quantize_int8, torch_int8_linear
from r1ray.training.range_meter import RangeMeter, split_groups
from tests.fakes import tiny_model

CUDA = torch.device("cuda")


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (1, 576), (17, 1000), (300, 5)])
def test_rounding_to_int8_is_the_same_but_for_ties(shape: tuple[int, int]) -> None:
    """CUDA multiplies by the reciprocal of a constant that a CPU divides by."""
    x = _normal(*shape)
    (q, scale), (found_q, found_scale) = quantize_int8(x), quantize_int8(x.to(CUDA))
    torch.testing.assert_close(found_scale.cpu(), scale, rtol=2e-7, atol=0)
    assert int((found_q.cpu().int() - q.int()).abs().max()) <= 1


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 300])
@pytest.mark.parametrize(
    ("inner", "outer"), [(8, 8), (576, 192), (1, 3), (13, 7), (100, 49), (5000, 130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_products_are_exact(
    rows: int, inner: int, outer: int, dtype: torch.dtype, has_bias: bool
) -> None:
    weight, scale = quantize_int8(_normal(outer, inner, seed=1).to(CUDA))
    bias = _normal(outer, seed=2).to(CUDA) if has_bias else None
    x = _normal(rows, inner).to(CUDA, dtype)
    x[rows // 2] = 0.0
    q, scale_M = quantize_int8(x)
    product = q.cpu().double() @ weight.cpu().double().t()
    expected = product * scale_M.cpu().double()[:, None] * scale.cpu().double()
    if bias is not None:
        expected += bias.cpu().double()
    eps = torch.finfo(dtype).eps
    plain = torch_int8_linear(x, weight, scale, bias)
    assert plain.dtype == dtype
    torch.testing.assert_close(
        plain.cpu().double(), expected, rtol=2 * eps, atol=float(eps * expected.abs().max())
    )
    # What lies between two integers may be rounded to the other one: a step of one product.
    step = float((scale_M.max() * scale.max() * 127).cpu())
    found = int8_linear(x, weight, scale, bias)
    assert found.dtype == dtype
    error = (found.cpu().double() - expected).abs()
    assert error.max() <= step + 2 * eps * expected.abs().max()
    assert error.mean() <= 0.05 * step + eps * expected.abs().max()


def test_what_is_not_finite_stays_so_in_its_row() -> None:
    x = _normal(3, 64).to(CUDA)
    x[0, 3], x[2, 5] = float("nan"), float("inf")
    found = int8_linear(x, *quantize_int8(_normal(8, 64).to(CUDA)))
    assert not torch.isfinite(found[0]).any()
    assert torch.isfinite(found[1]).all()
    assert not torch.isfinite(found[2]).any()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quant_products_are_exact_in_every_format(precision: torch.dtype) -> None:
    x, weight = _normal(33, 512), _normal(64, 512, seed=1)
    expected = fake_quant_linear(x, weight)
    with torch.autocast("cuda", dtype=precision, enabled=precision != torch.float32):
        found = fake_quant_linear(x.to(CUDA), weight.to(CUDA))
    tolerance = 2.0 * torch.finfo(precision).eps * float(expected.abs().max())
    torch.testing.assert_close(found.cpu().float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (7, 7), (200, 200)])
def test_attention_is_the_same(tokens: int, keys: int) -> None:
    q, k, v = _normal(2, 6, tokens, 64), _normal(2, 2, keys, 64, seed=1), _normal(2, 2, keys, 64)
    found = causal_attention(q.to(CUDA), k.to(CUDA), v.to(CUDA))
    torch.testing.assert_close(found.cpu(), causal_attention(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "bf16", "int4_zstd"])
def test_codecs_send_the_same_bytes(name: str) -> None:
    x = _normal(70_001) * 10.0 ** _normal(70_001, seed=1)
    payload, reconstruction = get_codec(name).encode_with_reconstruction(x.to(CUDA))
    expected, reconstruction_on_cpu = get_codec(name).encode_with_reconstruction(x)
    assert not payload.is_cuda
    assert reconstruction.is_cuda
    assert torch.equal(payload, expected)
    assert torch.equal(reconstruction.cpu(), reconstruction_on_cpu)


@pytest.mark.parametrize("fault", [None, float("inf"), float("nan")])
def test_gradient_ranges_are_the_same(fault: float | None) -> None:
    measured = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        for index, parameter in enumerate(model.parameters()):
            gradient = _normal(*parameter.shape, seed=index)
            gradient *= 10.0 ** (4 * _normal(*parameter.shape, seed=index + 1))
            if fault is not None and index == 3:
                gradient.view(-1)[5] = fault
            parameter.grad = gradient.to(device)
        measured.append(RangeMeter(split_groups(model), torch.float16).measure())
    for mine, theirs in zip(*measured, strict=True):
        assert mine.amax == theirs.amax
        assert mine.num_nonfinite == theirs.num_nonfinite
        assert mine.flushed_share == pytest.approx(theirs.flushed_share, rel=1e-5)
        assert mine.subnormal_share == pytest.approx(theirs.subnormal_share, rel=1e-5)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("start", "tokens"), [(0, 700), (0, 64), (256, 300), (640, 1024)])
def test_units_of_a_block_equal_the_masked_reference(
    start: int, tokens: int, is_int8: bool
) -> None:
    units, keys = -(-tokens // BLOCK), start + tokens + 30
    q = _normal(1, 6, tokens, 64).to(CUDA)
    k, v = (_normal(1, 2, keys, 64, seed=seed).to(CUDA) for seed in (1, 2))
    chosen = torch.full((1, 2, units, 4), -1)
    for unit in range(units):
        earlier = max(0, start // BLOCK + unit - 1)
        for head in range(2):
            order = torch.randperm(earlier)[:4]
            chosen[0, head, unit, : len(order)] = order
    states = [CachedStates(*quantize_states(x)) if is_int8 else CachedStates(x) for x in (k, v)]
    found = block_sparse_attention(q, *states, chosen.to(CUDA), [start])
    expected = reference_attention(q, *states, chosen.to(CUDA), [start])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [[0, 0], [100, 300], [63, 0]])
@pytest.mark.parametrize("tokens", [1, 70])
def test_attention_over_a_cache_equals_that_on_a_cpu(
    starts: list[int], tokens: int, dtype: torch.dtype
) -> None:
    q = _normal(2, 6, tokens, 64)
    k, v = (_normal(2, 2, max(starts) + tokens, 64, seed=seed) for seed in (1, 2))
    expected = cached_attention(q, CachedStates(k), CachedStates(v), starts)
    on_gpu = [x.to(CUDA, dtype) for x in (q, k, v)]
    states = [CachedStates(x) for x in on_gpu[1:]]
    found = cached_attention(on_gpu[0], *states, starts)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [2 * BLOCK, 1])
def test_marked_heads_choose_the_same_blocks(tokens: int) -> None:
    starts = [48 * BLOCK, 40 * BLOCK]
    q, k = _normal(2, 6, tokens, 32), CachedStates(_normal(2, 2, 50 * BLOCK, 32, seed=1))
    units = -(-tokens // BLOCK)
    owns = torch.tensor(starts)[:, None] // BLOCK + torch.arange(units)
    arguments = (
        torch.tensor([False, True] * 3),
        choose_blocks(_normal(2, 2, units, 50, seed=2), owns),
    )
    expected = choose_exact(q, k, *arguments, starts)
    moved = [item.to(CUDA) for item in arguments]
    found = choose_exact(q.to(CUDA), CachedStates(k.data_BKSH.to(CUDA)), *moved, starts)
    assert torch.equal(found.cpu().sort().values, expected.sort().values)
