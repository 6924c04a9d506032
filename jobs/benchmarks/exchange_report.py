"""The rows of docs/benchmarks/exchange.json, with their bars, from the figures of the cells.

A time to loss is that of the first kept weights whose validation loss is at most 1% above what DDP
fp32 reaches, with the same seed, at the end of its schedule; a run that misses it took forever.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.benchmarks.exchange_cells import R1RAY_ARMS, SEEDS
from r1ray.errors import ExchangeError
from r1ray.evaluation.record import Row

__all__ = [
    "build_rows",
    "bytes_rows",
    "find_cells",
    "gap_rows",
    "steady_arms",
    "steps_to_target",
    "time_rows",
    "times_to_target",
]

Results = Sequence[Mapping[str, Any]]
_MARGIN = 1.01
_BASELINES = ("ddp_fp32", "ddp_bf16")
_TIME_BARS = {("ddp_fp32", 200): 3, ("ddp_bf16", 200): 2, ("ddp_fp32", 50): 8, ("ddp_bf16", 50): 4}


def build_rows(
    results: Results, links: Mapping[str, Any], faults: Mapping[str, float]
) -> list[Row]:
    """Every row of the record.

    Args:
        links: rates as `links.measure_rate` found them, by nominal rate and kind.
        faults: seconds until training went on, by fault; empty where they were not measured.
    """
    return [
        *time_rows(results),
        *bytes_rows(results),
        *gap_rows(results),
        *(Row(f"exchange.recovery_s.{name}", value, "s") for name, value in faults.items()),
        *_soundness_rows(results),
        *_smollm2_rows(results),
        *(
            Row(f"exchange.link_rate.{kind}.{rate}mbit", value, "Mbit/s of payload")
            for rate, kinds in links["mbit_per_s"].items()
            for kind, value in kinds.items()
        ),
    ]


def find_cells(results: Results, **wanted: Any) -> list[Mapping[str, Any]]:
    """The cells whose fields have these values, in their order."""
    return [cell for cell in results if all(cell[name] == value for name, value in wanted.items())]


def times_to_target(results: Results, arm: str, rate_mbit: int) -> list[float]:
    """Seconds to the target loss in the headline's cells, by seed; infinite where missed."""
    return [
        point["seconds"] if point else math.inf for point in _crossings(results, arm, rate_mbit)
    ]


def steps_to_target(results: Results, arm: str) -> float:
    """Median number of steps to the target loss over the headline's cells; infinite if missed."""
    points = [point for rate in (200, 50) for point in _crossings(results, arm, rate)]
    return statistics.median(point["step"] if point else math.inf for point in points)


def steady_arms(results: Results) -> dict[str, float]:
    """From arm -> share of the headline's seeds that end in the same weights at both rates."""
    shares = {}
    for arm in dict.fromkeys(cell["arm"] for cell in find_cells(results, part="headline")):
        digests = [
            {cell["digest"] for cell in find_cells(results, part="headline", arm=arm, seed=seed)}
            for seed in SEEDS
        ]
        shares[arm] = sum(len(found) == 1 for found in digests) / len(digests)
    return shares


def time_rows(results: Results) -> list[Row]:
    """Time to the target loss: the best of r1ray's strategies against each baseline."""
    rows = []
    for (baseline, rate), bar in _TIME_BARS.items():
        base = times_to_target(results, baseline, rate)
        ratios = {arm: _ratios(base, times_to_target(results, arm, rate)) for arm in R1RAY_ARMS}
        best = max(R1RAY_ARMS, key=lambda arm: statistics.median(ratios[arm]))
        rows += [
            Row(
                f"exchange.time_to_loss_vs_{baseline}_{rate}mbit{suffix}",
                statistics.median(ratios[arm]),
                f"x faster ({arm})",
                (min(ratios[arm]), max(ratios[arm])),
                f"{baseline}, s",
                statistics.median(base),
                f">= {bar}",
            )
            for arm, suffix in ((best, ""), *((arm, f".{arm}") for arm in R1RAY_ARMS))
        ]
    return rows


def bytes_rows(results: Results) -> list[Row]:
    """Bytes sent at the interface, a step and worker, over whole runs, against DDP fp32's."""

    def row(row_id: str, sent: float, num_workers: int, bar: str | None) -> Row:
        (base,) = find_cells(results, part="bytes", arm="ddp_fp32", num_workers=num_workers)
        dense = base["sent_per_step"]
        baseline = f"ddp_fp32, {num_workers} workers, MB a step"
        return Row(row_id, sent / dense, "share", None, baseline, dense / 1e6, bar)

    name, bar = "exchange.delta4_bytes_share", "<= 0.125"
    shares = [
        row(f"{name}.{cell['num_workers']}w", cell["sent_per_step"], cell["num_workers"], bar)
        for cell in find_cells(results, part="bytes", arm="delta4")
    ]
    worst = max(shares, key=lambda item: item.value or 0.0)
    (stream,) = find_cells(results, part="bytes", arm="stream_h100")
    num_workers, num_streaming = stream["num_workers"], stream["streaming_steps"]
    streamed = stream["sent"][num_streaming - 1] / num_streaming
    name = "exchange.stream_bytes_share"
    return [
        replace(worst, id="exchange.delta4_bytes_share"),
        *shares,
        row(name, streamed, num_workers, "<= 0.0025"),
        row(f"{name}.whole_run", stream["sent_per_step"], num_workers, None),
    ]


def gap_rows(results: Results) -> list[Row]:
    """Final validation loss against `dense` at equal steps, mean and range over the seeds."""
    rows = []
    for model, suffix in (("small", ""), ("smollm2", ".smollm2")):
        cells = find_cells(results, part="quality", model=model)
        dense = [cell["final_loss"] for cell in find_cells(cells, arm="dense")]
        for arm in dict.fromkeys(cell["arm"] for cell in cells):
            mine = find_cells(cells, arm=arm)
            if any(cell["steps_done"] != cell["num_steps"] for cell in mine):
                raise ExchangeError(f"a quality cell of {arm} was capped: steps are not equal")
            accuracies = [cell["accuracy"] for cell in mine]
            rows.append(
                Row(
                    f"exchange.accuracy.{arm}{suffix}",
                    statistics.mean(accuracies),
                    "of held-out problems",
                    (min(accuracies), max(accuracies)),
                )
            )
            if arm == "dense":
                continue
            losses = [cell["final_loss"] for cell in mine]  # null where it was not finite
            gaps = [
                math.inf if loss is None else loss / base - 1
                for loss, base in zip(losses, dense, strict=True)
            ]
            bar = {"delta4": "<= 0.01", "delta4_async": "<= 0.015"}.get(arm, "<= 0.02")
            rows.append(
                Row(
                    f"exchange.{arm}_loss_gap{suffix}",
                    statistics.mean(gaps),
                    "of dense's loss",
                    (min(gaps), max(gaps)),
                    "dense, nats",
                    statistics.mean(dense),
                    bar,
                )
            )
    return rows


def _soundness_rows(results: Results) -> list[Row]:
    together = [cell for cell in results if cell["arm"] != "alone"]
    equal = sum(cell["has_equal_weights"] for cell in together) / len(together)
    return [
        Row("exchange.runs_ending_in_equal_weights", equal, "share of cells", bar="= 1"),
        *(
            Row(f"exchange.same_weights_at_both_rates.{arm}", share, "share of seeds")
            for arm, share in steady_arms(results).items()
        ),
    ]


def _smollm2_rows(results: Results) -> list[Row]:
    cells = find_cells(results, part="smollm2")
    (base,) = find_cells(cells, arm="ddp_fp32")
    return [
        Row(
            f"exchange.smollm2_step_s.{cell['arm']}",
            cell["step_s"],
            "s",
            baseline="ddp_fp32, 2 workers, 200 Mbit/s, s",
            baseline_value=base["step_s"],
        )
        for cell in cells
    ]


def _crossings(results: Results, arm: str, rate_mbit: int) -> list[Mapping[str, Any] | None]:
    """By seed, the first point of the loss curve that meets the target."""
    at_rate = find_cells(results, part="headline", rate_mbit=rate_mbit)
    points: list[Mapping[str, Any] | None] = []
    for seed in SEEDS:
        (base,) = find_cells(at_rate, arm="ddp_fp32", seed=seed)
        (cell,) = find_cells(at_rate, arm=arm, seed=seed)
        target = _MARGIN * base["final_loss"]
        if base["steps_done"] != base["num_steps"]:
            raise ExchangeError(f"{base['arm']} at {rate_mbit} Mbit/s was capped: no target")
        finite = (item for item in cell["curve"] if item["loss"] is not None)  # null where not
        points.append(next((item for item in finite if item["loss"] <= target), None))
    return points


def _ratios(base: Iterable[float], other: Iterable[float]) -> list[float]:
    """base / other, pair by pair; 0 where one of them never arrives."""
    pairs = zip(base, other, strict=True)
    return [0.0 if math.isinf(mine) or math.isinf(slow) else slow / mine for slow, mine in pairs]
