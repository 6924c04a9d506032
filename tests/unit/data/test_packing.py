import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.bucketing import cost_of_length
from r1ray.data.packing import PACK_MULTIPLE, pack_best_fit, plan_packs
from r1ray.errors import ShapeError


def _naive_fills(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as the textbook has it: each document looks at every bin."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=fills.__getitem__)] += length
        else:
            fills.append(length)
    return fills


@st.composite
def _documents(draw: st.DrawFn) -> tuple[list[int], int]:
    """(lengths, capacity); some with many equal lengths, some that fill bins to the brim."""
    capacity = draw(st.integers(1, 120))
    some = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=5))
    length = st.sampled_from(some) | st.integers(1, capacity)
    return draw(st.lists(length, max_size=60)), capacity


@settings(max_examples=150, deadline=None)
@given(case=_documents())
def test_bins_are_those_of_naive_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    bins = pack_best_fit(lengths, capacity)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    fills = [sum(lengths[row] for row in rows) for rows in bins]
    assert max(fills, default=0) <= capacity
    assert sorted(fills) == sorted(_naive_fills(lengths, capacity))
    for rows in bins:
        inside = [lengths[row] for row in rows]
        assert inside == sorted(inside, reverse=True)


def test_bins_are_plain_lists_of_ints() -> None:
    bins = pack_best_fit(np.array([5, 3, 4, 2], dtype=np.int32), 8)
    assert bins == [[0, 1], [2, 3]]
    assert all(type(rows) is list and all(type(row) is int for row in rows) for rows in bins)


def test_no_documents_make_no_bins() -> None:
    assert pack_best_fit([], 8) == []
    batches, left = plan_packs([], 64)
    assert batches == []
    assert (left.dtype, len(left)) == (np.int64, 0)


@pytest.mark.parametrize(
    ("lengths", "named"),
    [([4, 0, 7], "from 0 to 7"), ([-3, 2], "from -3 to 2"), ([4, 9], "from 4 to 9")],
)
def test_lengths_out_of_range_are_refused_with_capacity_and_length(
    lengths: list[int], named: str
) -> None:
    with pytest.raises(ShapeError, match=f"between 1 and the capacity 8, got lengths {named}"):
        pack_best_fit(lengths, 8)


def test_a_hundred_thousand_documents_a_second_are_packed() -> None:
    rng = np.random.default_rng(0)
    capacity, num_documents = 131_072, 200_000
    lengths = np.clip(rng.lognormal(7.0, 1.2, num_documents).astype(np.int64), 1, capacity)
    started = time.process_time()
    bins = pack_best_fit(lengths, capacity)
    seconds = time.process_time() - started
    assert num_documents / seconds >= 100_000
    # Many short documents fill what the long ones leave: one bin at most is not full.
    assert len(bins) <= math.ceil(lengths.sum() / capacity) + 1


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), max_size=80),
    slack=st.integers(0, 600),
    quadratic_tokens=st.none() | st.integers(50, 500),
    keep_partial=st.booleans(),
)
def test_packs_hold_each_row_once_within_the_budget(
    lengths: list[int], slack: int, quadratic_tokens: int | None, keep_partial: bool
) -> None:
    values = np.array(lengths, dtype=np.int64)
    costs = cost_of_length(values, quadratic_tokens)
    budget = math.ceil(costs.max(initial=1)) + slack
    batches, left = plan_packs(
        lengths, budget, quadratic_tokens=quadratic_tokens, keep_partial=keep_partial
    )
    rows = [row for batch in batches for row in batch.rows.tolist()] + left.tolist()
    assert sorted(rows) == list(range(len(lengths)))
    assert len(left) <= (0 if keep_partial else len(lengths) // 2)
    for batch in batches:
        assert costs[batch.rows].sum() <= budget
        num_tokens = values[batch.rows].sum()
        assert num_tokens <= batch.ceiling <= budget
        assert batch.ceiling - num_tokens < PACK_MULTIPLE
        assert batch.ceiling % PACK_MULTIPLE == 0 or batch.ceiling in (budget, num_tokens)


def test_a_packed_batch_is_rounded_up_to_64_tokens_but_not_above_the_budget() -> None:
    [first], _ = plan_packs([40, 30], 200)
    assert first.ceiling == 128
    [second], _ = plan_packs([100, 30], 131)
    assert second.ceiling == 131


def _values_of(lengths: list[int], rows: np.ndarray) -> list[int]:
    return [lengths[row] for row in rows]


def test_loose_bins_wait_for_the_next_window_and_tight_ones_do_not() -> None:
    lengths = [500, 500, 999, 300, 600]  # bins of 1000, 999 and 900
    batches, left = plan_packs(lengths, 1000, keep_partial=False)
    assert sorted(_values_of(lengths, batch.rows) for batch in batches) == [[500, 500], [999]]
    assert sorted(left.tolist()) == [3, 4]
    kept, nothing = plan_packs(lengths, 1000, keep_partial=True)
    assert (len(kept), len(nothing)) == (3, 0)


def test_half_of_the_rows_at_most_wait_however_loose_the_bins() -> None:
    batches, left = plan_packs([60] * 9, 100, keep_partial=False)  # nine bins, all of them loose
    assert (len(batches), len(left)) == (5, 4)


def test_gaps_that_best_fit_leaves_are_filled_by_packing_loose_bins_anew() -> None:
    lengths = [40] * 40 + [30] * 80  # best-fit: 40+40 and 30+30+30, in bins of 100
    assert len(pack_best_fit(lengths, 100)) == 47
    for keep_partial in (False, True):
        batches, left = plan_packs(lengths, 100, keep_partial=keep_partial)
        found = [sorted(_values_of(lengths, batch.rows)) for batch in batches]
        assert found == [[30, 30, 40]] * 40
        assert len(left) == 0


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.integers(10, 100), min_size=1, max_size=5),
    picks=st.lists(st.integers(0, 4), min_size=1, max_size=80),
)
def test_packing_anew_never_takes_more_bins_than_best_fit(
    kinds: list[int], picks: list[int]
) -> None:
    lengths = [kinds[pick % len(kinds)] for pick in picks]
    batches, _ = plan_packs(lengths, 100)
    assert len(batches) <= len(pack_best_fit(lengths, 100))
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(
        range(len(lengths))
    )


def test_a_row_that_costs_more_than_the_budget_is_refused() -> None:
    plan_packs([100], 200, quadratic_tokens=100)  # 100 + 100²/100
    with pytest.raises(ShapeError, match="capacity 199, got lengths from 200 to 200"):
        plan_packs([100], 199, quadratic_tokens=100)
