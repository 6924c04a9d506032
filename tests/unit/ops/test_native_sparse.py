"""Native block-sparse attention against torch's. Shape legend as in `r1ray.ops.native.sparse`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops import native
from r1ray.ops.block_selection import BLOCK
from r1ray.ops.block_sparse import reference_attention
from r1ray.ops.cached_states import CachedStates, quantize_states
from tests.native_kernels import ISAS, needs_native

BF16 = native.ISA_NAMES.index("avx512_bf16")

# float32 in another order of sums than torch's; values are within 3. 1.9e-6 in 1500 random shapes.
FLOAT_TOLERANCE = 4e-6
# Queries and shares are rounded to bfloat16, each by at most 2^-9 of itself. A share's error counts
# in full where one key has most of the weight; a score's by its size, here up to some 5.
# 7.5e-3 in 1000 random shapes.
BF16_TOLERANCE = 1.2e-2


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _choose_any(batch: int, groups: int, owns_BU: list[list[int]], most: int, seed: int) -> Tensor:
    """Up to `most` earlier blocks of every unit, in any order and number."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.full((batch, groups, len(owns_BU[0]), most), -1)
    for row, owns in enumerate(owns_BU):
        for unit, own in enumerate(owns):
            for group in range(groups):
                early = max(0, own - 1)
                count = int(torch.randint(min(most, early) + 1, (1,), generator=generator))
                blocks = torch.randperm(early, generator=generator)[:count]
                chosen[row, group, unit, :count] = blocks
    return chosen


def _owns(starts: list[int], tokens: int, unit: int) -> list[list[int]]:
    return [[(start + at * unit) // BLOCK for at in range(-(-tokens // unit))] for start in starts]


def _cache(batch: int, groups: int, keys: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """int8 [B, K, S, H] and scales [B, K, S], as slices of longer buffers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(
        -127, 128, (batch, groups, keys + 9, size), dtype=torch.int8, generator=generator
    )
    scales = torch.rand(batch, groups, keys + 9, generator=generator) / 60 + 1e-3
    return values[:, :, :keys], scales[:, :, :keys]


def _check_attention(
    isa: int, *, heads: int, groups: int, size: int, tokens: int, starts: list[int], unit: int,
    most: int = 4, beyond: int = 5, seed: int = 0,
) -> None:  # fmt: skip
    batch = len(starts)
    q = _random(batch, tokens, heads * groups, size, seed=seed).transpose(1, 2)
    keys = max(starts) + tokens + beyond
    k_int8, key_scale = _cache(batch, groups, keys, size, seed + 1)
    v_int8, value_scale = _cache(batch, groups, keys, size, seed + 2)
    k, v = k_int8 * key_scale[..., None], v_int8 * value_scale[..., None]
    chosen = _choose_any(batch, groups, _owns(starts, tokens, unit), most, seed)
    expected = reference_attention(q, CachedStates(k), CachedStates(v), chosen, starts)
    found = native.sparse_attention(q, k, v, chosen, starts, isa=isa)
    assert (found - expected).abs().max() <= FLOAT_TOLERANCE
    found = native.sparse_attention(
        *(q, k_int8, v_int8, chosen, starts),
        key_scale_BKS=key_scale,
        value_scale_BKS=value_scale,
        isa=isa,
    )
    is_narrow = isa == BF16 and unit == BLOCK
    assert (found - expected).abs().max() <= (BF16_TOLERANCE if is_narrow else FLOAT_TOLERANCE)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [8, 32, 34, 64, 80, 128])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_prompts_in_blocks_equal_the_reference(isa: int, heads: int, size: int) -> None:
    _check_attention(isa, heads=heads, groups=2, size=size, tokens=150, starts=[0, 128], unit=BLOCK)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [8, 32, 34, 64, 80, 128])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7])
def test_single_tokens_equal_the_reference(isa: int, heads: int, size: int) -> None:
    _check_attention(isa, heads=heads, groups=2, size=size, tokens=3, starts=[0, 511, 130], unit=1)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 5),
    groups=st.integers(1, 3),
    half=st.integers(1, 40),
    tokens=st.integers(2, 140),
    blocks=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    offset=st.integers(0, 63),
    is_single=st.booleans(),
    most=st.integers(0, 7),
    beyond=st.integers(0, 70),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    isa: int, heads: int, groups: int, half: int, tokens: int, blocks: list[int], offset: int,
    is_single: bool, most: int, beyond: int, seed: int,
) -> None:  # fmt: skip
    if is_single:
        tokens = tokens % 9 + 1
    _check_attention(
        isa,
        heads=heads,
        groups=groups,
        size=2 * half,
        tokens=tokens,
        starts=[block * BLOCK + (offset if is_single else 0) for block in blocks],
        unit=1 if is_single else BLOCK,
        most=most,
        beyond=beyond,
        seed=seed,
    )


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("two_threads")
def test_two_threads_equal_the_reference(isa: int) -> None:
    _check_attention(isa, heads=3, groups=3, size=64, tokens=700, starts=[64, 0], unit=BLOCK)
    _check_attention(isa, heads=3, groups=3, size=64, tokens=1, starts=[900, 640, 3], unit=1)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("starts", [[1500], [1500, 3], [0, 64]])
def test_one_token_split_among_threads_equals_the_reference(isa: int, starts: list[int]) -> None:
    for seed in range(4):
        _check_attention(
            isa, heads=4, groups=3, size=64, tokens=1, starts=starts, unit=1, most=14, seed=seed
        )


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("unit", [1, BLOCK])
def test_steep_scores_neither_overflow_nor_vanish(isa: int, unit: int) -> None:
    """Scores of hundreds, highest at either end of what is kept, in int8 as in float."""
    tokens = 2 if unit == 1 else 100
    start = 320
    q = 30 * _random(1, 2, tokens, 32, seed=0)
    k_int8, scale = _cache(1, 1, start + tokens, 32, 1)
    v_int8, _ = _cache(1, 1, start + tokens, 32, 2)
    units = -(-tokens // unit)
    chosen = torch.tensor([3, 0, 1]).expand(1, 1, units, 3)
    k, v = k_int8 * scale[..., None], v_int8 * scale[..., None]
    found = native.sparse_attention(q, k, v, chosen, [start], isa=isa)
    expected = reference_attention(q, CachedStates(k), CachedStates(v), chosen, [start])
    # Scores of up to 300 have errors of some 2^-23 of that, and shares the same.
    assert (found - expected).abs().max() <= 3e-4
    narrow = native.sparse_attention(
        q, k_int8, v_int8, chosen, [start], key_scale_BKS=scale, value_scale_BKS=scale, isa=isa
    )
    assert torch.isfinite(narrow).all()
    assert narrow.abs().max() <= v.abs().max() * 1.01


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("unit", [1, BLOCK])
def test_what_lies_behind_a_query_is_never_read(isa: int, unit: int) -> None:
    tokens, start = (1, 200) if unit == 1 else (90, 192)
    q = _random(1, 3, tokens, 64, seed=0)
    k, v = _random(2, 1, 1, 512, 64, seed=1)
    chosen = torch.zeros(1, 1, -(-tokens // unit), 1, dtype=torch.int64)
    expected = native.sparse_attention(q, k, v, chosen, [start], isa=isa)
    k[:, :, start + tokens :] = torch.nan
    v[:, :, start + tokens :] = torch.nan
    assert torch.equal(native.sparse_attention(q, k, v, chosen, [start], isa=isa), expected)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("unit", [1, BLOCK])
def test_a_query_that_is_not_a_number_spoils_itself_alone(isa: int, unit: int) -> None:
    tokens, start = (3, 200) if unit == 1 else (90, 192)
    q = _random(1, 3, tokens, 64, seed=0)
    k, v = _random(2, 1, 1, 512, 64, seed=1)
    chosen = torch.zeros(1, 1, -(-tokens // unit), 1, dtype=torch.int64)
    expected = native.sparse_attention(q, k, v, chosen, [start], isa=isa)
    q[0, 1, 2, 5] = torch.nan
    found = native.sparse_attention(q, k, v, chosen, [start], isa=isa)
    assert found[0, 1, 2].isnan().all()
    expected[0, 1, 2] = found[0, 1, 2] = 0.0
    assert torch.equal(found, expected)


@needs_native
@pytest.mark.parametrize("unit", [1, BLOCK])
@pytest.mark.parametrize("block", [-2, 3, 4, 2**40, -(2**40)])
@pytest.mark.usefixtures("two_threads")
def test_blocks_that_are_not_earlier_ones_are_refused(block: int, unit: int) -> None:
    tokens = 2 if unit == 1 else 65
    q = _random(1, 1, tokens, 16, seed=0)
    k = _random(1, 1, 400, 16, seed=1)
    chosen = torch.tensor([0, 1]).repeat(1, 1, 2, 1)
    native.sparse_attention(q, k, k, chosen, [256])
    chosen[0, 0, 0, 1] = block  # the own one is 4
    with pytest.raises(ShapeError, match="before the one before"):
        native.sparse_attention(q, k, k, chosen, [256])


@needs_native
def test_tensors_that_do_not_belong_together_are_refused() -> None:
    q, k = torch.zeros(1, 4, 70, 16), torch.zeros(1, 2, 80, 16)
    chosen = torch.full((1, 2, 2, 0), -1)
    k_int8, scale = k.to(torch.int8), torch.ones(1, 2, 80)
    native.sparse_attention(q, k, k, chosen, [0])
    for wrong in (
        (q.double(), k, k, chosen, [0]),
        (q, k.bfloat16(), k.bfloat16(), chosen, [0]),
        (q, k_int8, k_int8, chosen, [0]),  # without scales
        (q, k, k_int8, chosen, [0]),
        (q, k, k[:, :, 1:], chosen, [0]),
        (q, k, k, chosen.int(), [0]),
        (q[:, :3], k, k, chosen, [0]),
        (q[..., :8], k, k, chosen, [0]),
        (q, k, k, chosen[:, :1], [0]),
        (q, k, k, chosen, [0, 0]),
        (q, k.to("meta"), k, chosen, [0]),
        (q[0], k, k, chosen, [0]),
    ):
        with pytest.raises(ShapeError, match="do not belong together"):
            native.sparse_attention(*wrong)
    with pytest.raises(ShapeError, match="do not belong together"):
        native.sparse_attention(q, k, k, chosen, [0], key_scale_BKS=scale, value_scale_BKS=scale)
    with pytest.raises(ShapeError, match="do not belong together"):
        native.sparse_attention(
            q, k_int8, k_int8, chosen, [0], key_scale_BKS=scale, value_scale_BKS=scale[:, :, 1:]
        )
    with pytest.raises(ShapeError, match="within 80 keys"):
        native.sparse_attention(q, k, k, chosen, [64])
    with pytest.raises(ShapeError, match="multiples"):
        native.sparse_attention(q, k, k, chosen, [3])
    with pytest.raises(ShapeError, match="units"):
        native.sparse_attention(q, k, k, chosen.repeat(1, 1, 2, 1), [0])


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_query_gets_the_same_in_any_company_and_on_any_number_of_threads(
    isa: int, is_int8: bool
) -> None:
    starts, room = [3000, 5, 900, 6400], 6500
    q = _random(4, 6, 1, 64, seed=0)
    k, v = (CachedStates(_random(4, 2, room, 64, seed=seed)) for seed in (1, 2))
    if is_int8:
        k, v = (CachedStates(*quantize_states(item.data_BKSH)) for item in (k, v))
    counts = [max(0, min(start // BLOCK - 1, 1 + 12 * row)) for row, start in enumerate(starts)]
    chosen = torch.full((4, 2, 1, max(counts)), -1)
    for row, count in enumerate(counts):
        order = torch.randperm(max(1, starts[row] // BLOCK - 1))[:count]
        chosen[row, :, 0, :count] = order
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(_attend(isa, q, k, v, chosen, starts))
            for row, count in enumerate(counts):
                alone = _attend(
                    *(isa, q[row : row + 1], k.row(row), v.row(row)),
                    *(chosen[row : row + 1, ..., :count].contiguous(), [starts[row]]),
                )
                assert torch.equal(alone[0], found[-1][row])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def _attend(
    isa: int, q: Tensor, k: CachedStates, v: CachedStates, chosen: Tensor, starts: list[int]
) -> Tensor:
    return native.sparse_attention(
        *(q, k.data_BKSH, v.data_BKSH, chosen, starts),
        key_scale_BKS=k.scale_BKS,
        value_scale_BKS=v.scale_BKS,
        isa=isa,
    )
