"""The batching benchmark measures what it says: same rows, same memory, honest arithmetic."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmarks.batching_arms import ARMS, Shape, padding_share, plan_arm
from jobs.benchmarks.batching_data import build_micro_batch
from jobs.benchmarks.batching_report import padding_rows, scale_rows, throughput_rows
from jobs.benchmarks.batching_throughput import ArmTimes, read_times, sample_shapes, time_steps
from jobs.benchmarks.memory import run_measured
from r1ray.data.batch_set import IGNORED


def _lengths(count: int = 2000) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(3.5, 0.8, count)
    return np.clip(lengths, 2, 256).astype(np.int64)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_batches_every_row_once_within_the_same_memory(arm: str) -> None:
    lengths = _lengths()
    budget = 8 * int(lengths.max())
    shapes = plan_arm(arm, lengths, budget, seed=0)
    assert Counter(length for shape in shapes for length in shape.lengths) == Counter(
        lengths.tolist()
    )
    for shape in shapes:
        assert shape.real <= shape.computed
        # Lhotse may overshoot by the last cut of a batch being longer than those before it.
        assert shape.computed <= budget * (1.02 if arm == "lhotse" else 1.0)


def test_padding_share_counts_rows_times_columns() -> None:
    shapes = [Shape((3, 5), 6), Shape((4, 4), 10, is_packed=True)]
    assert padding_share(shapes) == pytest.approx(1 - 16 / 22)


def test_a_micro_batch_has_the_shape_and_the_targets_of_its_rows() -> None:
    padded = build_micro_batch(Shape((3, 5), 6), vocab_size=50, seed=0)
    assert padded.input_ids_BT.shape == (2, 6)
    assert padded.document_lengths is None
    packed = build_micro_batch(Shape((3, 5), 10, is_packed=True), vocab_size=50, seed=0)
    assert packed.input_ids_BT.shape == (1, 10)
    assert packed.document_lengths == (3, 5, 2)
    for batch in (padded, packed):
        assert batch.num_tokens == 8
        assert batch.num_targets == int((batch.labels_BT != IGNORED).sum()) == 6
    assert packed.labels_BT[0, 2] == IGNORED  # the next document's first token is no target


def test_a_sample_spreads_over_the_lengths() -> None:
    shapes = [Shape((length,), length) for length in range(1, 101)]
    sample = sample_shapes(shapes, 10, seed=0)
    assert [shape.columns // 10 for shape in sample] == list(range(10))
    assert sample_shapes(shapes[:5], 10, seed=0) == shapes[:5]


def test_steps_are_timed_for_every_arm_and_found_again(tmp_path: Path) -> None:
    lengths, path = np.clip(_lengths(200), 2, 24), tmp_path / "steps.jsonl"
    time_steps(lengths, num_batches=2, path=path)
    times = read_times(path)
    assert set(times) == set(ARMS)
    for arm in ARMS:
        assert len(times[arm].seconds) == 2
        assert (times[arm].seconds > 0).all()
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * len(ARMS)
    path.write_text("\n".join([*lines[:-1], lines[-1][:10]]))  # killed while it wrote
    assert sum(len(times.seconds) for times in read_times(path).values()) == len(lines) - 1
    time_steps(lengths, num_batches=2, path=path)
    again = path.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert len(again) == len(lines)


def _times(seconds: float) -> ArmTimes:
    return ArmTimes(np.full(6, 100.0), np.full(6, 120.0), np.full(6, seconds))


def test_ratios_compare_the_faster_arm_with_the_fastest_rival_and_name_the_worse_set() -> None:
    speeds = {"random": 4.0, "group_by_length": 2.0, "lhotse": 1.6, "r1ray_ceilings": 1.7}
    sets = {
        "r1_like": {**speeds, "r1ray_buckets": 1.6, "r1ray_packing": 1.25},
        "chat_like": {**speeds, "r1ray_buckets": 1.6, "r1ray_packing": 2.0},
    }
    rows = {
        row.id: row
        for row in throughput_rows(
            {key: {arm: _times(value) for arm, value in arms.items()} for key, arms in sets.items()}
        )
    }
    assert rows["batching.tokens_per_s_vs_best_peer.r1_like"].value == pytest.approx(1.28)
    assert rows["batching.tokens_per_s_vs_best_peer"].value == pytest.approx(1.0)
    assert rows["batching.tokens_per_s_vs_random"].value == pytest.approx(2.5)
    assert rows["batching.tokens_per_s_vs_random"].met
    assert rows["batching.tokens_per_s.lhotse.r1_like"].value == pytest.approx(62.5)


def test_the_headline_padding_and_growth_are_the_worst_ones() -> None:
    shares = dict.fromkeys(ARMS, 0.5)
    rows = {
        row.id: row
        for row in padding_rows(
            {
                "r1_like": {**shares, "r1ray_packing": 0.001, "r1ray_ceilings": 0.06},
                "demo_traces": {**shares, "r1ray_packing": 0.02, "r1ray_ceilings": 0.01},
            }
        )
    }
    assert rows["batching.packed_padding_share"].value == 0.02
    assert rows["batching.packed_padding_share"].met is False
    assert rows["batching.bucketed_padding_share"].value == 0.06

    roles = ("driver", "driver_resident", "worker", "worker_resident")
    small = {f"{role}_bytes": 100 for role in roles}
    large = {**dict.fromkeys(small, 110), "worker_bytes": 130}
    rates = {"rows_per_s": 1.0, "tokens_per_s": 1.0}
    growth = {
        row.id: row
        for row in scale_rows(
            {**small, **rates, "num_rows": 10}, {**large, **rates, "num_rows": 100}
        )
    }
    assert growth["batching.peak_memory_growth_10x_rows"].value == pytest.approx(1.3)
    assert growth["batching.peak_memory_growth_10x_rows"].met is False
    assert growth["batching.peak_memory_growth_10x_rows.driver"].met is True


def test_a_measured_command_reports_its_own_peak() -> None:
    code = "import time; block = bytearray(80_000_000); time.sleep(0.6)"
    peaks = run_measured([sys.executable, "-c", code], timeout_s=30)
    assert 80e6 < peaks.driver_bytes < peaks.driver_resident_bytes < 200e6
    assert peaks.worker_bytes == 0
    with pytest.raises(subprocess.CalledProcessError):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], timeout_s=30)
    with pytest.raises(subprocess.TimeoutExpired):
        run_measured([sys.executable, "-c", "import time; time.sleep(30)"], timeout_s=0.5)
