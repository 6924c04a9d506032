import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.bucketing import fit_bucket_ceilings, fit_histogram_ceilings, plan_batches
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


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    num_buckets=st.integers(1, 6),
    slack=st.integers(0, 900),
)
def test_batches_cover_each_row_once_and_never_exceed_the_budget(
    lengths: list[int], num_buckets: int, slack: int
) -> None:
    ceilings = fit_bucket_ceilings(lengths, num_buckets)
    budget = max(lengths) + slack
    batches = plan_batches(lengths, ceilings, budget)
    rows = sorted(row for _, batch in batches for row in batch)
    assert rows == list(range(len(lengths)))
    for ceiling, batch in batches:
        assert batch
        assert ceiling in ceilings
        assert ceiling * len(batch) <= budget
        # The smallest ceiling that holds the row: no batch pads more than it must.
        for row in batch:
            assert ceiling == min(top for top in ceilings if top >= lengths[row])


def test_only_the_last_batch_of_a_bucket_is_not_full() -> None:
    batches = plan_batches([10] * 25 + [20] * 5, [10, 20], 100)
    assert [(ceiling, len(batch)) for ceiling, batch in batches] == [
        (10, 10),
        (10, 10),
        (10, 5),
        (20, 5),
    ]


def test_no_rows_make_no_batches() -> None:
    assert plan_batches([], [8], 64) == []


def test_lengths_and_ceilings_above_their_bounds_are_refused() -> None:
    with pytest.raises(ShapeError, match="length 9 is above the last ceiling 8"):
        plan_batches([3, 9], [4, 8], 64)
    with pytest.raises(ShapeError, match="ceiling 8 is above batch_tokens 7; raise batch_tokens"):
        plan_batches([3], [4, 8], 7)
