"""Block-sparse attention against the same by a mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops.block_selection import BLOCK, TOKENS_TOGETHER
from r1ray.ops.block_sparse import (
    block_sparse_attention,
    build_block_mask,
    reference_attention,
)
from r1ray.ops.cached_states import CachedStates, quantize_states


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels have tests of their own."""
    monkeypatch.setattr("r1ray.ops.native.can_attend", lambda *_: False)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _choose(
    firsts: list[int],
    kv_heads: int,
    units: int,
    step: int,
    limit: int,
    seed: int,
    *,
    uneven: int = 0,
) -> Tensor:
    """Random blocks for every unit: up to `limit` of those before the one before it.

    Args:
        firsts: each row's block of the first query; `step` tokens a unit.
        uneven: blocks that a group has less than the one before it.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.full((len(firsts), kv_heads, units, limit), -1)
    for row, first in enumerate(firsts):
        for unit in range(units):
            earlier = max(0, (first * BLOCK + unit * step) // BLOCK - 1)
            count = min(earlier, int(torch.randint(limit + 1, (), generator=generator)))
            for head in range(kv_heads):
                order = torch.randperm(earlier, generator=generator)
                fewer = max(0, count - head * uneven)
                chosen[row, head, unit, :fewer] = order[:fewer]
    return chosen


def _compare(
    starts: list[int], chosen: Tensor, groups: int, tokens: int, keys: int, seed: int
) -> None:
    """Random queries, keys and values: the operator against its oracle."""
    rows, kv_heads = chosen.shape[:2]
    q = _normal(rows, kv_heads * groups, tokens, 16, seed=seed)
    k = _normal(rows, kv_heads, keys, 16, seed=seed + 1)
    v = _normal(rows, kv_heads, keys, 16, seed=seed + 2)
    for make in (CachedStates, lambda x: CachedStates(*quantize_states(x))):
        found = block_sparse_attention(q, make(k), make(v), chosen, starts)
        expected = reference_attention(q, make(k), make(v), chosen, starts)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 330),
    firsts=st.lists(st.integers(0, 6), min_size=1, max_size=2),
    spare=st.integers(0, 70),
    limit=st.integers(0, 5),
    uneven=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_units_of_a_block_equal_the_masked_reference(
    kv_heads: int,
    groups: int,
    tokens: int,
    firsts: list[int],
    spare: int,
    limit: int,
    uneven: int,
    seed: int,
) -> None:
    units = -(-tokens // BLOCK)
    keys = max(firsts) * BLOCK + tokens + spare
    starts = [first * BLOCK for first in firsts]
    chosen = _choose(firsts, kv_heads, units, BLOCK, limit, seed, uneven=uneven)
    _compare(starts, chosen, groups, tokens, keys, seed)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 3),
    starts=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    limit=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_single_tokens_equal_the_masked_reference(
    kv_heads: int, groups: int, tokens: int, starts: list[int], limit: int, seed: int
) -> None:
    firsts = [start // BLOCK for start in starts]
    chosen = _choose(firsts, kv_heads, tokens, 1, limit, seed)
    _compare(starts, chosen, groups, tokens, max(starts) + tokens, seed)


def test_with_all_blocks_chosen_it_is_causal_attention() -> None:
    q, k, v = (_normal(1, heads, 300, 16, seed=heads) for heads in (6, 2, 2))
    chosen = torch.full((1, 2, 5, 3), -1)
    for unit in range(2, 5):
        chosen[:, :, unit, : unit - 1] = torch.arange(unit - 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    found = block_sparse_attention(q, CachedStates(k), CachedStates(v), chosen, [0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_keys_that_are_not_kept_do_not_count() -> None:
    q, k, v = (_normal(1, 2, 256, 16, seed=seed) for seed in range(3))
    chosen = torch.full((1, 2, 4, 1), -1)
    chosen[:, :, 3] = 0
    before = block_sparse_attention(q, CachedStates(k), CachedStates(v), chosen, [0])
    k[:, :, BLOCK : 2 * BLOCK] = 7.0
    v[:, :, BLOCK : 2 * BLOCK] = 7.0
    after = block_sparse_attention(q, CachedStates(k), CachedStates(v), chosen, [0])
    assert torch.equal(before[:, :, 3 * BLOCK :], after[:, :, 3 * BLOCK :])
    assert not torch.equal(before[:, :, 2 * BLOCK : 3 * BLOCK], after[:, :, 2 * BLOCK : 3 * BLOCK])


@pytest.mark.parametrize(("first", "tokens"), [(0, 300), (3, 128), (5, 200)])
def test_the_mask_for_gpus_holds_the_same_blocks(first: int, tokens: int) -> None:
    units, keys = -(-tokens // BLOCK), first * BLOCK + tokens
    chosen = _choose([first], 2, units, BLOCK, 3, seed=7)
    mask = build_block_mask(chosen[0], first, (tokens, keys), groups=3)
    found = mask.full_kv_indices
    assert found is not None
    assert mask.full_kv_num_blocks is not None
    for head in range(6):
        for unit in range(units):
            own = first + unit
            count = int(mask.full_kv_num_blocks[0, head, unit])
            whole = set(found[0, head, unit, :count].tolist())
            expected = {*chosen[0, head // 3, unit].tolist(), own - 1} - {-1}
            assert whole == expected
            assert mask.kv_num_blocks[0, head, unit] == 1
            assert mask.kv_indices[0, head, unit, 0] == own


@pytest.mark.parametrize(
    ("shape", "starts", "message"),
    [
        ((1, 2, 3, 1), [0], "3 units fit neither 128 tokens nor their 2 blocks"),
        ((1, 2, 2, 1), [10], "start at multiples of it"),
        ((1, 1, 2, 1), [0], "are not of the same rows"),
        ((1, 2, 2, 1), [64], "see past the 128 keys"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], starts: list[int], message: str
) -> None:
    q, k = torch.zeros(1, 2, 128, 16), CachedStates(torch.zeros(1, 2, 128, 16))
    with pytest.raises(ShapeError, match=message):
        block_sparse_attention(q, k, k, torch.full(shape, -1), starts)


def test_many_single_queries_gather_a_few_at_a_time() -> None:
    """As where an answer is read again, after another had its memory."""
    tokens, keys = 2 * TOKENS_TOGETHER + 5, 12 * BLOCK
    chosen = _choose([9], 2, tokens, 1, 3, seed=1)
    q, k, v = _normal(1, 4, tokens, 8, seed=2), *(_normal(1, 2, keys, 8, seed=s) for s in (3, 4))
    states = CachedStates(k), CachedStates(v)

    found = block_sparse_attention(q, *states, chosen, [9 * BLOCK])

    expected = reference_attention(q, *states, chosen, [9 * BLOCK])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    one = block_sparse_attention(q[:, :, 40:41], *states, chosen[:, :, 40:41], [9 * BLOCK + 40])
    torch.testing.assert_close(found[:, :, 40:41], one, rtol=0, atol=1e-6)
