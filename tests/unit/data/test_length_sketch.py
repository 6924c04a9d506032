from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from r1ray.data.length_sketch import LengthSketch
from r1ray.errors import ShapeError

# Half of them near powers of two, where bins change their width.
_LENGTHS = st.integers(1, 2**40) | st.builds(
    lambda exponent, offset: max(1, 2**exponent + offset),
    st.integers(0, 40),
    st.integers(-3, 3),
)


def _sketch(lengths: object, bits: int | None = 8) -> LengthSketch:
    sketch = LengthSketch(bits)
    sketch.add(lengths)
    return sketch


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(_LENGTHS, max_size=60))
def test_without_bits_every_length_is_counted_exactly(lengths: list[int]) -> None:
    sketch = _sketch(lengths, bits=None)
    assert sketch.counts == Counter(lengths)
    assert sketch.num_rows == len(lengths)


@settings(max_examples=200, deadline=None)
@given(length=_LENGTHS, bits=st.integers(1, 12))
def test_a_bin_is_an_upper_bound_within_its_relative_width(length: int, bits: int) -> None:
    [top] = _sketch([length], bits).counts
    assert length <= top
    assert (top - length) << bits < length  # in whole numbers: less than a share of 2^-bits
    if length < 2**bits:
        assert top == length
    assert list(_sketch([top], bits).counts) == [top]  # a bin's name is in the bin


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(_LENGTHS, min_size=2, max_size=60))
def test_bins_keep_the_order_of_lengths(lengths: list[int]) -> None:
    ordered = sorted(lengths)
    tops = [next(iter(_sketch([length]).counts)) for length in ordered]
    assert tops == sorted(tops)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.lists(_LENGTHS, max_size=20), min_size=1, max_size=5),
    bits=st.none() | st.integers(2, 10),
)
def test_it_counts_parts_as_it_counts_the_whole(parts: list[list[int]], bits: int | None) -> None:
    grown = LengthSketch(bits)
    for part in parts:
        grown.add(part)
    whole = _sketch([length for part in parts for length in part], bits)
    assert grown.counts == whole.counts
    assert grown.num_rows == sum(map(len, parts))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=50),
    share=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.95, 1.0]) | st.floats(0, 1),
)
def test_quantiles_are_numpys(lengths: list[int], share: float) -> None:
    place = share * len(lengths)
    assume(place == round(place) or abs(place - round(place)) > 1e-6)  # else rounding decides
    expected = int(np.quantile(np.array(lengths), share, method="inverted_cdf"))
    assert _sketch(lengths, bits=None).quantile(share) == expected
    rough = _sketch(lengths).quantile(share)
    assert expected <= rough < expected * (1 + 2**-8)


def test_distances_are_those_of_the_cumulative_shares() -> None:
    def distance(first: list[int], second: list[int]) -> float:
        there = _sketch(first).distance(_sketch(second))
        back = _sketch(second).distance(_sketch(first))
        assert there == back
        return there

    assert distance([1, 2, 3, 4], [4, 3, 2, 1] * 5) == 0.0
    assert distance([1, 2, 3], [10, 20, 300]) == 1.0
    # Shares up to 1: 0.75 and 0.25; up to 2: 0.75 and 1; up to 5: both 1.
    assert distance([1, 1, 1, 5], [1, 2, 2, 2]) == pytest.approx(0.5)


def test_the_distance_of_two_samples_is_their_kolmogorov_smirnov_statistic() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 200, 500), rng.integers(40, 220, 300)
    points = np.arange(1, 221)
    gaps = [np.mean(first <= point) - np.mean(second <= point) for point in points]
    # Lengths below 2^8 are exact, so the sketches give the distance of the samples.
    assert _sketch(first).distance(_sketch(second)) == pytest.approx(max(map(abs, gaps)))


def test_a_million_different_lengths_take_a_few_thousand_bins() -> None:
    sketch = _sketch(np.arange(1, 1_000_001))
    assert sketch.num_rows == 1_000_000
    assert len(sketch.counts) <= 3_600


def test_an_empty_sketch_counts_nothing_and_is_not_asked() -> None:
    empty, other = LengthSketch(), _sketch([3])
    empty.add(np.array([], dtype=np.int64))
    assert (empty.counts, empty.num_rows) == ({}, 0)
    with pytest.raises(ShapeError, match="empty length sketch has no quantiles"):
        empty.quantile(0.5)
    for first, second in ((empty, other), (other, empty)):
        with pytest.raises(ShapeError, match="empty length sketch has no distance"):
            first.distance(second)


@pytest.mark.parametrize("length", [0, -7])
def test_lengths_below_one_are_refused_and_not_counted(length: int) -> None:
    sketch = LengthSketch()
    with pytest.raises(ShapeError, match=f"counts lengths >= 1, got {length}"):
        sketch.add([5, length])
    assert sketch.num_rows == 0
