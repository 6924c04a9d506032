"""Blocks that marked heads choose by their keys: native kernels against torch, and what is found.

Shape legend as in `r1ray.ops.exact_choice`.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from r1ray.errors import ShapeError
from r1ray.ops import native
from r1ray.ops.block_selection import (
    BLOCK,
    TOKENS_TOGETHER,
    choose_blocks,
    count_both,
    count_chosen,
)
from r1ray.ops.cached_states import CachedStates, quantize_states
from r1ray.ops.exact_choice import choose_exact
from tests.native_kernels import ISAS, needs_native

DTYPES = [torch.float32, torch.int8]


@pytest.fixture(autouse=True)
def few_dense_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a few thousand tokens choose."""
    monkeypatch.setattr("r1ray.ops.block_selection.DENSE_BLOCKS", 4)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _states(k: Tensor, dtype: torch.dtype) -> CachedStates:
    return CachedStates(*quantize_states(k)) if dtype == torch.int8 else CachedStates(k)


def _by_torch(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr("r1ray.ops.native.can_attend", lambda *_: False)
        return choose_exact(*arguments)


def _shares(q_GLH: Tensor, k_SH: Tensor, first: int) -> Tensor:
    """What every block counts for one unit, written out: [C]."""
    shares = []
    for at in range(q_GLH.shape[1]):
        scores = q_GLH[:, at] @ k_SH[: first + at + 1].T / q_GLH.shape[-1] ** 0.5
        peaks = torch.stack([part.amax(-1) for part in scores.split(BLOCK, dim=1)], dim=-1)
        shares.append(peaks.softmax(-1))
    return torch.stack(shares).amax((0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", [pytest.param(-1, id="torch"), *ISAS])
@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 6, 16, 64, 80]),
    units=st.integers(1, 3),
    unit=st.sampled_from([1, BLOCK]),
    starts=st.lists(st.integers(0, 25), min_size=1, max_size=2),
    seed=st.integers(0, 1000),
)
def test_the_blocks_with_the_greatest_shares_are_chosen(
    isa: int, dtype: torch.dtype, heads: int, groups: int, size: int, units: int, unit: int,
    starts: list[int], seed: int,
) -> None:  # fmt: skip
    batch, tokens = len(starts), units * unit
    first = [start * BLOCK + (seed % BLOCK if unit == 1 else 0) for start in starts]
    room = max(first) + tokens + 13
    q = 2 * _random(batch, heads * groups, tokens, size, seed=seed)
    k = _states(_random(batch, groups, room, size, seed=seed + 1), dtype)
    marks = _random(heads * groups, seed=seed + 2) > 0
    of_groups = marks.unflatten(0, (groups, heads))
    owns = [[(start + at * unit) // BLOCK for at in range(units)] for start in first]
    scores = _random(batch, groups, units, max(map(max, owns)) + 1, seed=seed + 3)
    before = choose_blocks(scores, torch.tensor(owns))  # by gates
    most = before.shape[3]
    with pytest.MonkeyPatch.context() as patch:
        if isa < 0:
            patch.setattr("r1ray.ops.native.can_attend", lambda *_: False)
        else:
            patch.setattr("r1ray.ops.native.sparse.best_isa", lambda: isa)
        chosen = choose_exact(q, k, marks, before, first)
    unmarked = ~of_groups.any(1)
    assert torch.equal(chosen[:, unmarked, :, :most], before[:, unmarked])
    assert (chosen[:, unmarked, :, most:] == -1).all()
    floats = k.floats()
    for row, start in enumerate(first):
        for at in range(units):
            own = (start + at * unit) // BLOCK
            kept = count_chosen(own) if unit == 1 else min(1, count_chosen(own))
            count = count_both(own) if unit == 1 else count_chosen(own)
            for group in of_groups.any(1).nonzero().flatten().tolist():
                found = chosen[row, group, at]
                assert (found[count:] == -1).all()
                assert len(set(found[:count].tolist())) == count
                if count in (0, own - 1):
                    assert found[:count].sort().values.tolist() == list(range(count))
                    continue
                assert 0 <= int(found[:count].min()) <= int(found[:count].max()) <= own - 2
                first_ones = before[row, group, at, :kept]
                assert set(found[:kept].tolist()) == set(first_ones.tolist())
                part = slice(at * unit, (at + 1) * unit)
                queries = q[row].unflatten(0, (groups, heads))[group, of_groups[group], part]
                shares = _shares(queries, floats[row, group], start + at * unit)
                worth = shares[found[kept:count]].sort(descending=True).values
                shares[first_ones] = 0
                best = shares[: own - 1].sort(descending=True).values[: count - kept]
                is_rounded = dtype == torch.int8 and isa >= 2 and unit == BLOCK
                tolerance = 0.05 if is_rounded else 1e-4
                assert ((best - worth) <= tolerance * best + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [BLOCK, 1])
def test_a_single_token_that_one_query_looks_for_is_found(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, needle, size = 40, 17 * BLOCK + 5, 32
    q = _random(1, 3, tokens, size, seed=0)
    k = 0.3 * _random(1, 1, (own + 1) * BLOCK, size, seed=1)
    k[0, 0, needle] = 8 * q[0, 1, tokens // 3] / q[0, 1, tokens // 3].norm()
    arguments = (
        q,
        _states(k, dtype),
        torch.tensor([False, True, False]),
        torch.tensor([[[[0] + [-1] * (count_chosen(own) - 1)]]]),
    )
    for chosen in (
        choose_exact(*arguments, [own * BLOCK]),
        _by_torch(monkeypatch, *arguments, [own * BLOCK]),
    ):
        assert chosen[0, 0, 0, :2].tolist() == [0, needle // BLOCK]


@pytest.mark.parametrize("isa", [pytest.param(-1, id="torch"), *ISAS])
def test_what_one_query_needs_counts_more_than_what_all_like_a_little(isa: int) -> None:
    own, size = 40, 32
    q, k = torch.zeros(1, 1, BLOCK, size), torch.zeros(1, 1, (own + 1) * BLOCK, size)
    q[0, 0, ::2, 0] = q[0, 0, 1::2, 1] = 40.0  # each half gives a seventh to seven blocks
    k[0, 0, 4 * BLOCK : 11 * BLOCK, 0] = k[0, 0, 14 * BLOCK : 21 * BLOCK, 1] = 1.0
    q[0, 0, 11] = 16.0 * torch.eye(size)[2]  # half to the first block, half to the 33rd
    k[0, 0, 5, 2] = k[0, 0, 33 * BLOCK + 7, 2] = 4.0
    before = torch.zeros(1, 1, 1, count_chosen(own)).long()
    with pytest.MonkeyPatch.context() as patch:
        if isa < 0:
            patch.setattr("r1ray.ops.native.can_attend", lambda *_: False)
        else:
            patch.setattr("r1ray.ops.native.sparse.best_isa", lambda: isa)
        chosen = choose_exact(q, CachedStates(k), torch.tensor([True]), before, [own * BLOCK])
    assert chosen[0, 0, 0, :2].tolist() == [0, 33]


@needs_native
def test_keys_that_do_not_belong_to_the_queries_are_refused() -> None:
    own = 30
    q, k = torch.zeros(1, 4, BLOCK, 16), torch.zeros(1, 2, (own + 1) * BLOCK, 16)
    marks, chosen = torch.tensor([True, False] * 2), torch.zeros(1, 2, 1, 20).long()
    counts, starts = [[10]], [own * BLOCK]
    right = (q, k, marks, counts, starts, chosen)
    native.choose_exact(*right)
    for index, wrong in (
        (0, q.double()),
        (0, q[:, :3]),
        (1, k[:, :1]),
        (1, k[..., :8]),
        (1, k.to(torch.int8)),
        (2, marks[:1]),
        (2, marks.int()),
        (3, [[10, 10]]),
        (4, [own * BLOCK, 0]),
        (5, chosen[:, :1]),
        (5, chosen.mT),
    ):
        with pytest.raises(ShapeError, match="do not belong together"):
            native.choose_exact(*right[:index], wrong, *right[index + 1 :])
    for wrong_start in (own * BLOCK + 1, (own + 1) * BLOCK, -BLOCK):
        with pytest.raises(ShapeError, match="multiples"):
            native.choose_exact(q, k, marks, counts, [wrong_start], chosen)
    with pytest.raises(ShapeError, match="whole units"):
        native.choose_exact(q[:, :, :40], k, marks, counts, starts, chosen)
    for count in (21, own, -1):  # more than there is room for, or than there are
        with pytest.raises(ShapeError, match="before the one before"):
            native.choose_exact(q, k, marks, [[count]], starts, chosen)


def test_many_single_queries_choose_as_each_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, own = 2 * TOKENS_TOGETHER + 3, 10
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, heads, count, 8, generator=generator)
        for heads, count in ((4, tokens), (2, 14 * BLOCK))
    )
    is_marked = torch.tensor([False, True, False, False])
    start = own * BLOCK
    owns = torch.arange(start, start + tokens)[None] // BLOCK
    chosen = choose_blocks(torch.randn(1, 2, tokens, 14, generator=generator), owns)

    together = _by_torch(monkeypatch, q, CachedStates(k), is_marked, chosen, [start])

    for at in (0, TOKENS_TOGETHER - 1, TOKENS_TOGETHER, tokens - 1):
        arguments = (q[:, :, at : at + 1], CachedStates(k), is_marked, chosen[:, :, at : at + 1])
        alone = _by_torch(monkeypatch, *arguments, [start + at])
        count = count_both((start + at) // BLOCK)
        assert torch.equal(together[:, :, at : at + 1, :count], alone[..., :count])
