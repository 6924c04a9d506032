from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from r1ray.data.reservoir import Replay, Reservoir, read_samples
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from r1ray.errors import ArtifactError, ConfigError
from r1ray.models.memory import RESERVOIR_NAME, memory_path
from tests.unit.training.batches import random_samples, write_batch_set


def _samples(first: int, count: int, length: int = 1) -> pa.Table:
    """Samples whose tokens are their number."""
    ids = [[first + at] * length for at in range(count)]
    flags = [[True] * length for _ in range(count)]
    return pa.table({"input_ids": ids, "is_target": flags}, schema=SAMPLE_SCHEMA)


def _numbers(samples: pa.Table) -> list[int]:
    return [row[0] for row in samples["input_ids"].to_pylist()]


def test_every_sample_is_kept_with_the_same_chance() -> None:
    seen, capacity, rounds = 50, 10, 2000
    counts = np.zeros(seen)
    for seed in range(rounds):
        reservoir = Reservoir(capacity, seed=seed)
        reservoir.add(_samples(0, seen))
        kept = _numbers(reservoir.samples())
        assert len(set(kept)) == capacity
        counts[kept] += 1
    expected = rounds * capacity / seen
    chi_square = ((counts - expected) ** 2 / (expected * (1 - capacity / seen))).sum()
    # 49 degrees of freedom: 85 is exceeded once in a thousand times; seeds are fixed.
    assert chi_square < 85


def test_data_sets_count_by_their_size_whatever_their_order(tmp_path: Path) -> None:
    kept = []
    for seed in range(200):
        first = Reservoir(20, seed=seed)
        first.add(_samples(0, 300))
        first.save(tmp_path)
        second = Reservoir.recall(tmp_path, 20, seed=seed)
        second.add(_samples(1000, 100))
        assert second.num_seen == 400
        kept += _numbers(second.samples())
    share = np.mean([number < 1000 for number in kept])
    assert share == pytest.approx(0.75, abs=0.02)  # 4,000 draws: three standard errors


def test_the_outcome_does_not_depend_on_how_tables_are_cut_and_is_made_again() -> None:
    whole, parts = Reservoir(8, seed=3), Reservoir(8, seed=3)
    whole.add(_samples(0, 100))
    for start, count in ((0, 1), (1, 60), (61, 39)):
        parts.add(_samples(start, count))
    assert _numbers(parts.samples()) == _numbers(whole.samples())
    other = Reservoir(8, seed=4)
    other.add(_samples(0, 100))
    assert _numbers(other.samples()) != _numbers(whole.samples())


def test_a_reservoir_goes_on_from_its_file(tmp_path: Path) -> None:
    path = memory_path(tmp_path, RESERVOIR_NAME)
    assert Reservoir.recall(tmp_path, 8, seed=0).num_seen == 0  # nothing lies there
    saved = Reservoir(8, seed=0)
    saved.add(_samples(0, 5))
    saved.save(tmp_path)
    larger = Reservoir.load(path, 16, seed=0)  # nothing was let go yet
    larger.add(_samples(5, 11))
    assert _numbers(larger.samples()) == list(range(16))
    larger.add(_samples(16, 100))
    larger.save(tmp_path)
    smaller = Reservoir.load(path, 4, seed=0)
    assert set(_numbers(smaller.samples())) < set(_numbers(larger.samples()))
    assert (len(_numbers(smaller.samples())), smaller.num_seen) == (4, 116)
    with pytest.raises(ConfigError, match=r"reservoir_rows \(17\) is above the 16 .* of 100"):
        Reservoir.load(path, 17, seed=0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="no readable reservoir"):
        Reservoir.load(path, 4, seed=0)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.75])
def test_replayed_samples_have_their_share_and_all_are_replayed_alike(share: float) -> None:
    reservoir = Reservoir(64, seed=0)
    reservoir.add(_samples(0, 64))
    replay = Replay(reservoir, share, seed=0, max_tokens=8)
    mixed = [replay.mix(_samples(1000 + 7 * at, 7)) for at in range(100)]
    numbers = [number for table in mixed for number in _numbers(table)]
    replayed = [number for number in numbers if number < 1000]
    assert len(replayed) / len(numbers) == pytest.approx(share, abs=0.002)
    assert replay.num_replayed == len(replayed)
    times = np.bincount(replayed, minlength=64)
    assert times.max() - times.min() <= 1
    # Over the whole stream, not at its end alone.
    half = [number < 1000 for table in mixed[:50] for number in _numbers(table)]
    assert np.mean(half) == pytest.approx(share, abs=0.01)
    assert reservoir.num_seen == 64 + 700  # replayed samples are not seen twice


def test_what_is_too_long_or_not_there_is_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    reservoir = Reservoir(64, seed=0)
    reservoir.add(_samples(0, 4, length=9))
    reservoir.add(_samples(10, 4, length=8))
    replay = Replay(reservoir, 0.5, seed=0, max_tokens=8)
    assert set(_numbers(replay.mix(_samples(100, 20)))) & set(range(50)) == {10, 11, 12, 13}
    assert "4 of 8 kept samples are longer than prepare.max_tokens (8)" in caplog.text
    first = Replay(Reservoir(64, seed=0), 0.5, seed=0, max_tokens=8)
    assert first.mix(_samples(0, 20)).num_rows == 20
    assert first.mix(_samples(20, 20)).num_rows == 20  # of the same data set: nothing to recall


def test_the_samples_of_a_batch_set_are_those_that_went_in(tmp_path: Path) -> None:
    write_batch_set(tmp_path / "set", seed=3)
    rows = [row for table in read_samples(tmp_path / "set") for row in table.to_pylist()]
    expected = random_samples(3).to_pylist()
    assert sorted(rows, key=str) == sorted(expected, key=str)
