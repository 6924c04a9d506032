import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.bucketing import (
    cost_of_length,
    fit_bucket_ceilings,
    fit_histogram_ceilings,
    plan_batches,
)
from r1ray.errors import ShapeError


def _padding(lengths: Sequence[int], ceilings: Sequence[int]) -> int:
    return sum(min(top for top in ceilings if top >= length) - length for length in lengths)


def _least_padding(lengths: Sequence[int], num_buckets: int) -> int:
    """Brute force: every choice of ceilings among the distinct lengths."""
    values = sorted(set(lengths))
    return min(
        _padding(lengths, [*lower, values[-1]])
        for count in range(min(num_buckets, len(values)))
        for lower in itertools.combinations(values[:-1], count)
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(
        lambda items: len(set(items)) <= 10
    )
    | st.lists(st.integers(1, 10_000), min_size=1, max_size=9),
    num_buckets=st.integers(1, 6),
)
def test_ceilings_have_the_least_padding_of_all_choices(
    lengths: list[int], num_buckets: int
) -> None:
    ceilings = fit_bucket_ceilings(lengths, num_buckets)
    assert len(ceilings) <= num_buckets
    assert ceilings == sorted(set(ceilings))
    assert ceilings[-1] == max(lengths)
    assert _padding(lengths, ceilings) == _least_padding(lengths, num_buckets)


def test_a_histogram_gives_the_ceilings_of_its_lengths() -> None:
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4, 1)) + 1 for _ in range(500)]
    assert fit_histogram_ceilings(Counter(lengths), 5) == fit_bucket_ceilings(lengths, 5)


def test_enough_buckets_need_no_padding() -> None:
    lengths = [3, 9, 9, 4, 100]
    assert fit_bucket_ceilings(lengths, 4) == [3, 4, 9, 100]
    assert fit_bucket_ceilings(lengths, 50) == [3, 4, 9, 100]


def test_more_buckets_never_pad_more() -> None:
    rng = random.Random(1)
    lengths = [int(rng.lognormvariate(5, 1)) + 1 for _ in range(400)]
    paddings = [_padding(lengths, fit_bucket_ceilings(lengths, count)) for count in range(1, 12)]
    assert paddings == sorted(paddings, reverse=True)


@pytest.mark.parametrize(
    ("lengths", "num_buckets"), [([], 3), ([0, 4], 3), ([-1], 1), ([4], 0), ([4], -2)]
)
def test_lengths_and_counts_below_one_are_refused(lengths: list[int], num_buckets: int) -> None:
    with pytest.raises(ShapeError, match="buckets need lengths >= 1 and num_buckets >= 1"):
        fit_bucket_ceilings(lengths, num_buckets)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.dictionaries(st.integers(1, 500), st.integers(1, 10**6), min_size=1, max_size=8),
    num_buckets=st.integers(1, 5),
    quadratic_tokens=st.integers(1, 400),
)
def test_with_a_quadratic_cost_that_cost_is_the_least(
    counts: dict[int, int], num_buckets: int, quadratic_tokens: int
) -> None:
    def padded_cost(ceilings: Sequence[int]) -> float:
        tops = [min(top for top in ceilings if top >= length) for length in counts]
        costs = cost_of_length(tops, quadratic_tokens)
        return float(sum(costs * np.array(list(counts.values()))))

    fitted = fit_histogram_ceilings(counts, num_buckets, quadratic_tokens=quadratic_tokens)
    values = sorted(counts)
    least = min(
        padded_cost([*lower, values[-1]])
        for count in range(min(num_buckets, len(values)))
        for lower in itertools.combinations(values[:-1], count)
    )
    assert len(fitted) <= num_buckets
    assert padded_cost(fitted) == pytest.approx(least, rel=1e-12)


def _plain_program(values: Sequence[int], num_buckets: int) -> int:
    """The textbook dynamic program, every begin tried for every end: O(K·M²)."""
    best = [0] + [10**18] * len(values)
    for _ in range(num_buckets):
        best = [0] + [
            min(best[begin] + (end - begin) * values[end - 1] for begin in range(end))
            for end in range(1, len(values) + 1)
        ]
    return best[-1] - sum(values)


@pytest.mark.parametrize("seed", range(4))
def test_hundreds_of_distinct_lengths_are_fitted_as_the_plain_program_does(seed: int) -> None:
    rng = random.Random(seed)
    values = sorted(rng.sample(range(1, 50_000), 300))
    if seed % 2:
        values = sorted({int(1.02**number) + number for number in range(300)})
    assert _padding(values, fit_bucket_ceilings(values, 7)) == _plain_program(values, 7)


def test_a_hundred_thousand_distinct_lengths_take_seconds() -> None:
    shapes = {
        "even": dict.fromkeys(range(1, 100001), 1),
        "waves": {
            length: int(10 ** (6 * abs(math.sin(length / 300)))) for length in range(1, 10**5)
        },
        "spikes": {length: 10**6 if length % 2 else 1 for length in range(1, 100_001)},
    }
    for name, counts in shapes.items():
        started = time.process_time()
        assert len(fit_histogram_ceilings(counts, 64)) == 64
        assert time.process_time() - started < 5.0, name


def test_a_padding_target_takes_the_fewest_buckets_that_meet_it() -> None:
    rng = random.Random(2)
    lengths = [int(rng.lognormvariate(5, 1)) + 1 for _ in range(1000)]

    def share(ceilings: Sequence[int]) -> float:
        padding = _padding(lengths, ceilings)
        return padding / (padding + sum(lengths))

    fitted = fit_bucket_ceilings(lengths, 64, max_padding_share=0.05)
    assert share(fitted) <= 0.05 < share(fit_bucket_ceilings(lengths, len(fitted) - 1))
    assert len(fit_bucket_ceilings(lengths, 3, max_padding_share=0.05)) == 3  # the most there are


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    num_buckets=st.integers(1, 6),
    slack=st.integers(0, 900),
    quadratic_tokens=st.none() | st.integers(50, 500),
    keep_partial=st.booleans(),
)
def test_batches_cover_each_row_once_and_never_exceed_the_budget(
    lengths: list[int],
    num_buckets: int,
    slack: int,
    quadratic_tokens: int | None,
    keep_partial: bool,
) -> None:
    ceilings = fit_bucket_ceilings(lengths, num_buckets, quadratic_tokens=quadratic_tokens)
    budget = math.ceil(cost_of_length(max(lengths), quadratic_tokens)) + slack
    batches, left = plan_batches(
        lengths, ceilings, budget, quadratic_tokens=quadratic_tokens, keep_partial=keep_partial
    )
    rows = [row for batch in batches for row in batch.rows.tolist()] + left.tolist()
    assert sorted(rows) == list(range(len(lengths)))
    assert not (keep_partial and len(left))
    for batch in batches:
        assert len(batch.rows)
        assert batch.ceiling in ceilings
        cost = float(cost_of_length(batch.ceiling, quadratic_tokens))
        assert cost * len(batch.rows) <= budget
        if not keep_partial:
            assert cost * (len(batch.rows) + 1) > budget
        # The smallest ceiling that holds the row: no batch pads more than it must.
        for row in batch.rows:
            assert batch.ceiling == min(top for top in ceilings if top >= lengths[row])


def test_only_the_last_batch_of_a_bucket_is_not_full() -> None:
    batches, left = plan_batches([10] * 25 + [20] * 5, [10, 20], 100)
    shapes = [(batch.ceiling, len(batch.rows)) for batch in batches]
    assert shapes == [(10, 10), (10, 10), (10, 5), (20, 5)]
    assert len(left) == 0
    batches, left = plan_batches([10] * 25 + [20] * 5, [10, 20], 100, keep_partial=False)
    assert [len(batch.rows) for batch in batches] == [10, 10, 5]
    assert left.tolist() == [20, 21, 22, 23, 24]


def test_no_rows_make_no_batches() -> None:
    batches, left = plan_batches([], [8], 64)
    assert batches == []
    assert len(left) == 0


def test_lengths_and_ceilings_above_their_bounds_are_refused() -> None:
    with pytest.raises(ShapeError, match="length 9 is above the last ceiling 8"):
        plan_batches([3, 9], [4, 8], 64)
    with pytest.raises(ShapeError, match="ceiling 8 is above batch_tokens 7; raise batch_tokens"):
        plan_batches([3], [4, 8], 7)
    with pytest.raises(ShapeError, match="ceiling 8 costs 16 tokens, above batch_tokens 15"):
        plan_batches([3], [4, 8], 15, quadratic_tokens=8)
