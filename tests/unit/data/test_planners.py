import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from r1ray.config.prepare import (
    BucketsConfig,
    FileSourceConfig,
    PackingConfig,
    PrepareConfig,
)
from r1ray.data.bucketing import cost_of_length
from r1ray.data.planners import (
    DRIFT_LIMIT,
    DRIFT_ROWS,
    BatchPlanner,
    FixedBuckets,
    LearnedBuckets,
    PackingPlanner,
)

Lengths = NDArray[np.int64]
MAX_TOKENS = 400


def _config(batching: BucketsConfig | PackingConfig, **changes: Any) -> PrepareConfig:
    values: dict[str, Any] = {
        "sources": [FileSourceConfig(type="files", paths=["rows.jsonl"])],
        "max_tokens": MAX_TOKENS,
        "batch_tokens": 2048,
        "batching": batching,
    }
    return PrepareConfig(**{**values, **changes})


def _learned(fit_rows: int, num_buckets: int = 8, **changes: Any) -> LearnedBuckets:
    batching = BucketsConfig(
        type="buckets", num_buckets=num_buckets, max_padding_share=None, fit_rows=fit_rows
    )
    return LearnedBuckets(_config(batching, **changes), batching)


def _stream(
    planner: BatchPlanner, windows: list[Lengths]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """(ceiling, rows of the whole stream, their lengths) of each batch, as `BatchWriter` does."""
    left_rows = left_lengths = np.array([], dtype=np.int64)
    seen = 0
    for number, window in enumerate(windows):
        rows = np.concatenate([left_rows, np.arange(seen, seen + len(window))])
        lengths = np.concatenate([left_lengths, window])
        seen += len(window)
        is_last = number == len(windows) - 1
        if len(rows) == 0:
            continue
        batches, left = planner.plan(lengths, len(window), is_last=is_last)
        left = np.sort(left)
        left_rows, left_lengths = rows[left], lengths[left]
        for batch in batches:
            yield batch.ceiling, rows[batch.rows], lengths[batch.rows]
    assert len(left_rows) == 0


def _padding_share(batches: list[tuple[int, Any, Lengths]]) -> float:
    computed = sum(ceiling * len(rows) for ceiling, rows, _ in batches)
    return 1 - sum(int(lengths.sum()) for _, _, lengths in batches) / computed


def _draw(seed: int, num_rows: int, mean: float, spread: float = 0.4) -> Lengths:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(math.log(mean), spread, num_rows), 1, MAX_TOKENS).astype(np.int64)


def _cut(lengths: Lengths, size: int) -> list[Lengths]:
    return [lengths[start : start + size] for start in range(0, len(lengths), size)]


@settings(max_examples=150, deadline=None)
@given(
    windows=st.lists(
        st.lists(st.integers(1, MAX_TOKENS), max_size=30).map(lambda row: np.array(row, np.int64)),
        min_size=1,
        max_size=8,
    ),
    kind=st.sampled_from(["fixed", "learned", "packing"]),
    fit_rows=st.integers(1, 60),
    quadratic_tokens=st.none() | st.just(200),
    batch_tokens=st.sampled_from([1200, 1300, 4000]),
)
def test_every_row_of_a_stream_ends_in_exactly_one_batch(
    windows: list[Lengths],
    kind: str,
    fit_rows: int,
    quadratic_tokens: int | None,
    batch_tokens: int,
) -> None:
    changes = {"quadratic_tokens": quadratic_tokens, "batch_tokens": batch_tokens}
    planner: BatchPlanner
    if kind == "fixed":
        planner = FixedBuckets(_config(BucketsConfig(type="buckets"), **changes), [50, 200, 400])
    elif kind == "learned":
        planner = _learned(fit_rows, num_buckets=3, **changes)
    else:
        planner = PackingPlanner(_config(PackingConfig(type="packing"), **changes))
    stream = np.concatenate(windows)
    batches = list(_stream(planner, windows))
    rows = [row for _, found, _ in batches for row in found.tolist()]
    assert sorted(rows) == list(range(len(stream)))
    for ceiling, found, lengths in batches:
        assert (stream[found] == lengths).all()
        if kind == "packing":
            assert lengths.sum() <= ceiling <= batch_tokens
            assert cost_of_length(lengths, quadratic_tokens).sum() <= batch_tokens
        else:
            assert lengths.max() <= ceiling
            cost = float(cost_of_length(ceiling, quadratic_tokens))
            assert cost * len(found) <= batch_tokens


def test_planners_without_learned_ceilings_say_what_they_use() -> None:
    fixed = FixedBuckets(_config(BucketsConfig(type="buckets")), [100, 400])
    packing = PackingPlanner(_config(PackingConfig(type="packing")))
    list(_stream(fixed, [_draw(0, 50, 60)] * 2))
    list(_stream(packing, [_draw(0, 50, 60)] * 2))
    assert [(fit.first_sample, fit.ceilings, fit.distance) for fit in fixed.fits] == [
        (0, (100, 400), None)
    ]
    assert packing.fits == []


def test_learned_buckets_hold_rows_back_until_there_are_enough_to_fit() -> None:
    planner = _learned(fit_rows=100)
    window = np.full(40, 30)
    lengths = window
    for _ in range(2):
        batches, left = planner.plan(lengths, 40, is_last=False)
        assert batches == []
        assert left.tolist() == list(range(len(lengths)))
        assert planner.fits == []
        lengths = np.concatenate([lengths, window])
    batches, left = planner.plan(lengths, 40, is_last=False)
    assert len(batches) == 1  # 68 rows of 30 tokens fill one
    assert sum(len(batch.rows) for batch in batches) + len(left) == 120
    assert [fit.first_sample for fit in planner.fits] == [0]


def test_a_stream_that_ends_before_there_are_enough_rows_is_fitted_to_what_there_is() -> None:
    planner = _learned(fit_rows=1000, num_buckets=3)
    batches = list(_stream(planner, [np.array([10, 10]), np.array([20])]))
    assert [fit.ceilings for fit in planner.fits] == [(10, 20, MAX_TOKENS)]
    assert sorted((ceiling, len(rows)) for ceiling, rows, _ in batches) == [(10, 2), (20, 1)]


def test_the_last_ceiling_holds_whatever_may_come() -> None:
    planner = _learned(fit_rows=20, num_buckets=2)
    batches = list(_stream(planner, [np.full(20, 10), np.array([MAX_TOKENS, 11])]))
    assert planner.fits[0].ceilings == (10, MAX_TOKENS)
    assert [ceiling for ceiling, _, lengths in batches if lengths.max() > 10] == [MAX_TOKENS]


def test_no_ceiling_is_above_the_longest_sample_allowed() -> None:
    """A bin of the sketch goes by its largest length, which may be above max_tokens."""
    longest = 1000  # in a bin from 1000 to 1001
    planner = _learned(fit_rows=1, max_tokens=longest)
    list(_stream(planner, [np.array([longest, 900, 40])]))
    assert planner.fits[0].ceilings[-1] == longest


@pytest.mark.parametrize("seed", range(6))
def test_lengths_that_stay_as_they_were_are_fitted_once(seed: int) -> None:
    planner = _learned(fit_rows=DRIFT_ROWS)
    list(_stream(planner, _cut(_draw(seed, 12 * DRIFT_ROWS, 60), DRIFT_ROWS // 2)))
    assert [(fit.first_sample, fit.distance) for fit in planner.fits] == [(0, None)]


@pytest.mark.parametrize("window", [DRIFT_ROWS // 4, DRIFT_ROWS // 2, DRIFT_ROWS])
def test_lengths_that_shift_are_fitted_once_more_and_padded_less(
    window: int, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = _draw(0, 3 * DRIFT_ROWS, 40), _draw(1, 5 * DRIFT_ROWS, 160)
    planner = _learned(fit_rows=DRIFT_ROWS)
    with caplog.at_level(logging.INFO, logger="r1ray.data.planners"):
        batches = list(_stream(planner, _cut(np.concatenate([before, after]), window)))
    first, second = planner.fits
    assert len(before) <= second.first_sample <= len(before) + 2 * DRIFT_ROWS
    assert second.distance is not None
    assert second.distance > DRIFT_LIMIT

    [record] = caplog.records
    assert record.getMessage() == (
        f"lengths drifted by {second.distance:.2f} (Kolmogorov-Smirnov, limit 0.10) at sample "
        f"{second.first_sample}: {len(second.ceilings)} new ceilings from {second.ceilings[0]} to "
        f"{MAX_TOKENS} tokens"
    )

    kept = FixedBuckets(planner._config, list(first.ceilings))
    with_old = list(_stream(kept, _cut(np.concatenate([before, after]), window)))
    since = second.first_sample + window
    learned, fixed = (
        _padding_share([batch for batch in found if batch[1].min() >= since])
        for found in (batches, with_old)
    )
    assert learned < 0.5 * fixed


def test_a_shift_in_the_middle_of_a_comparison_is_settled_by_two_fits_at_most() -> None:
    """The first of them may see rows from before and after, the second only rows from after."""
    for share in (0.05, 0.3, 0.5, 0.8):
        num_before = 2 * DRIFT_ROWS + int(share * DRIFT_ROWS)
        before, after = _draw(0, num_before, 40), _draw(1, 6 * DRIFT_ROWS, 160)
        planner = _learned(fit_rows=DRIFT_ROWS)
        list(_stream(planner, _cut(np.concatenate([before, after]), DRIFT_ROWS // 4)))
        assert 2 <= len(planner.fits) <= 3
        assert planner.fits[-1].first_sample <= num_before + 2 * DRIFT_ROWS
        clean = _learned(fit_rows=DRIFT_ROWS)
        list(_stream(clean, _cut(after, DRIFT_ROWS // 4)))
        # Both fits see 4,096 rows or more of the same distribution: the ceilings lie close.
        settled, alone = planner.fits[-1].ceilings[:-1], clean.fits[0].ceilings[:-1]
        np.testing.assert_allclose(settled[2:-1], alone[2:-1], rtol=0.1)


def test_fewer_rows_than_a_comparison_needs_are_not_compared() -> None:
    planner = _learned(fit_rows=100)
    windows = [_draw(0, 100, 40), *_cut(_draw(1, DRIFT_ROWS - 1, 300), 1000)]
    list(_stream(planner, windows))
    assert len(planner.fits) == 1


@pytest.mark.parametrize("fit_rows", [20, 50, 300])
def test_few_rows_to_fit_to_are_not_mistaken_for_a_drift(fit_rows: int) -> None:
    for seed in range(10):
        lengths = np.random.default_rng(seed).integers(10, 400, 3 * DRIFT_ROWS)
        planner = _learned(fit_rows)
        for window in _cut(lengths, fit_rows):
            planner.plan(window, len(window), is_last=False)
        assert len(planner.fits) == 1, seed


def test_learned_buckets_are_no_more_than_asked_for() -> None:
    for num_buckets in (1, 2, 5):
        planner = _learned(fit_rows=500, num_buckets=num_buckets)
        planner.plan(_draw(0, 500, 60), 500, is_last=True)
        assert len(planner.fits[0].ceilings) == num_buckets
        assert planner.fits[0].ceilings[-1] == MAX_TOKENS


def test_long_rows_are_not_held_back_beyond_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.data.planners._MAX_HELD_TOKENS", 5000)
    planner = _learned(fit_rows=10_000)
    assert planner.plan(np.full(10, 300), 10, is_last=False)[0] == []
    batches, _ = planner.plan(np.full(20, 300), 10, is_last=False)
    assert batches
    assert len(planner.fits) == 1
