"""The rows of docs/benchmarks/batching.json, with their bars, and the plot beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jobs.benchmarks.batching_arms import ARMS, PEERS, R1RAY
from jobs.benchmarks.batching_data import SETS
from jobs.benchmarks.batching_throughput import ArmTimes
from r1ray.evaluation.record import Row

__all__ = ["padding_rows", "plot_batching", "preallocation_rows", "scale_rows", "throughput_rows"]

_SEED = 0
_LARGE_SETS = SETS[:2]  # 20,000 rows each; the demo's traces are reported beside them
_COLORS = ("#8c96a3", "#b8a15a", "#c98b6b", "#90b4e0", "#2b6cb0", "#1a365d")


def padding_rows(shares: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """From set -> arm -> padded share. The headline is the worst of all sets."""
    rows = []
    for arm, name, bar in (
        ("r1ray_packing", "packed", "<= 0.01"),
        ("r1ray_ceilings", "bucketed", "<= 0.05"),
    ):
        worst = max(shares, key=lambda key: shares[key][arm])
        rows.append(_padding_row(f"batching.{name}_padding_share", shares[worst], arm, bar))
        rows += [
            _padding_row(f"batching.{name}_padding_share.{key}", shares[key], arm, bar)
            for key in shares
        ]
    rows += [
        Row(f"batching.padding_share.{arm}.{key}", shares[key][arm], "share")
        for arm in ("random", *PEERS, "r1ray_buckets")
        for key in shares
    ]
    return rows


def _padding_row(name: str, shares: Mapping[str, float], arm: str, bar: str) -> Row:
    baseline = "random batches of 8"
    return Row(name, shares[arm], "share", None, baseline, shares["random"], bar)


def throughput_rows(times: Mapping[str, Mapping[str, ArmTimes]]) -> list[Row]:
    """From set -> arm -> timed steps. The headline is the worst of the two large sets."""
    rows = [
        Row(f"batching.tokens_per_s.{arm}.{key}", times[key][arm].tokens_per_s, "tokens/s")
        for key in times
        for arm in ARMS
    ]
    for name, bar, min_low, rivals in (
        ("tokens_per_s_vs_random", ">= 1.5", None, ("random",)),
        ("tokens_per_s_vs_best_peer", ">= 1.0", 0.97, PEERS),
    ):
        ratios = {
            key: replace(
                _ratio(f"batching.{name}.{key}", times[key], rivals),
                bar=bar,
                min_interval_low=min_low,
            )
            for key in times
        }
        worst = min(
            (ratios[key] for key in _LARGE_SETS if key in ratios), key=lambda row: row.value or 0.0
        )
        rows.append(replace(worst, id=f"batching.{name}"))
        rows += ratios.values()
    return rows


def _ratio(name: str, times: Mapping[str, ArmTimes], rivals: Sequence[str]) -> Row:
    """The fastest of r1ray's arms over the fastest rival, with a bootstrap interval."""
    ours = max(R1RAY, key=lambda arm: times[arm].tokens_per_s)
    rival = max(rivals, key=lambda arm: times[arm].tokens_per_s)
    rng = np.random.default_rng(_SEED)
    ratios = times[ours].bootstrap(rng) / times[rival].bootstrap(rng)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Row(
        name,
        times[ours].tokens_per_s / times[rival].tokens_per_s,
        f"x ({ours})",
        (float(low), float(high)),
        f"{rival}, tokens/s",
        times[rival].tokens_per_s,
    )


def scale_rows(small: Mapping[str, Any], large: Mapping[str, Any]) -> list[Row]:
    """Growth of memory from the small to the large number of rows; the headline is the worst."""
    name, bar = "batching.peak_memory_growth_10x_rows", "<= 1.2"

    def growth(role: str, row_id: str) -> Row:
        before = small[f"{role}_bytes"]
        baseline = f"{role.replace('_', ', ')} at {small['num_rows']:,} rows, MB"
        value = large[f"{role}_bytes"] / before
        return Row(row_id, value, "x", None, baseline, before / 1e6, bar)

    roles = ("driver", "driver_resident", "worker", "worker_resident")
    worst = max(roles, key=lambda role: growth(role, name).value or 0.0)
    rows = [growth(worst, name), *(growth(role, f"{name}.{role}") for role in roles)]
    for part in (small, large):
        count = part["num_rows"]
        rows += [
            Row(f"batching.prepare_rows_per_s.{count}", part["rows_per_s"], "rows/s"),
            Row(f"batching.prepare_tokens_per_s.{count}", part["tokens_per_s"], "tokens/s"),
        ]
    return rows


def preallocation_rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """From mode -> repetitions, taken in turn: time and peak memory against `fresh`."""

    def compare(row_id: str, mode: str, name: str, unit: str, baseline: str, scale: float) -> Row:
        fresh = np.array([run[name] for run in runs["fresh"]])
        other = np.array([run[name] for run in runs[mode]])
        ratios = fresh / other if name == "seconds" else other / fresh
        return Row(
            row_id,
            float(np.median(ratios)),
            unit,
            (float(ratios.min()), float(ratios.max())),
            f"allocating per batch, {baseline}",
            float(np.median(fresh)) * scale,
        )

    gain, peak = "batching.preallocation_gain", "batching.preallocation_peak_memory"
    return [
        compare(gain, "reused", "seconds", "x faster steps", "s", 1.0),
        compare(f"{gain}.buffers", "buffers", "seconds", "x faster steps", "s", 1.0),
        compare(peak, "reused", "peak_bytes", "x peak memory", "MB", 1e-6),
        compare(f"{peak}.buffers", "buffers", "peak_bytes", "x peak memory", "MB", 1e-6),
        compare("batching.preallocation_page_faults", "reused", "page_faults", "x", "faults", 1.0),
    ]


def plot_batching(
    shares: Mapping[str, Mapping[str, float]],
    times: Mapping[str, Mapping[str, ArmTimes]],
    path: Path,
) -> None:
    """Padded share and throughput of every arm on every set."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    width = 0.8 / len(ARMS)
    for index, (arm, color) in enumerate(zip(ARMS, _COLORS, strict=True)):
        places = [place + (index - (len(ARMS) - 1) / 2) * width for place in range(len(SETS))]
        padding = [100 * shares[key][arm] for key in SETS]
        bars = left.bar(places, padding, width, color=color, label=arm.replace("_", " "))
        left.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        speed = [times[key][arm].tokens_per_s / times[key]["random"].tokens_per_s for key in SETS]
        bars = right.bar(places, speed, width, color=color)
        right.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    left.set(title="Padding", ylabel="% of the computed tokens")
    right.set(title="Real tokens per second in training steps", ylabel="x random batches")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(range(len(SETS)), [key.replace("_", " ") for key in SETS])
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
