"""The rows of docs/benchmarks/precision.json, with their bars, and the table of failures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.benchmarks.precision_arms import ARMS
from jobs.benchmarks.precision_failures import KINDS, has_survived
from r1ray.evaluation.record import Row

__all__ = ["failure_rows", "render_failures", "step_rows"]

_DRAWS, _SEED = 2000, 0
_NAMES = {"plain": "bf16", "gradscaler": "bf16_gradscaler", "range": "bf16_range"}


def step_rows(steps: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Throughput, loss, the controller's share; ids without an arm are the range controller's.

    Args:
        steps: by the model's shape; ids without one are those of `layers`.
    """
    arms, tokens = steps["layers"]["arms"], steps["layers"]["step_tokens"]
    seconds = _seconds(steps["layers"])
    speed = tokens / seconds["fp32"].mean()
    loss = arms["fp32"]["final_loss"]
    rows = [
        Row(f"precision.tokens_per_s.{_NAMES.get(arm, arm)}", tokens / spent.mean(), "tokens/s")
        for arm, spent in seconds.items()
    ]
    for arm, name in _NAMES.items():
        is_ours = arm == "range"
        suffix = "" if is_ours else f".{name}"
        gap = abs(arms[arm]["final_loss"] / loss - 1)
        rows += [
            Row(
                f"precision.throughput_vs_fp32{suffix}",
                float(seconds["fp32"].sum() / seconds[arm].sum()),
                "x",
                _interval(seconds["fp32"], seconds[arm]),
                "fp32, tokens/s",
                float(speed),
                ">= 1.4" if is_ours else None,
            ),
            Row(
                f"precision.loss_gap{suffix}",
                gap,
                "of the loss",
                None,
                "fp32, nats",
                loss,
                "<= 0.005" if is_ours else None,
            ),
        ]
    for shape in ("width_256", "smollm2"):
        spent = _seconds(steps[shape])
        rows.append(
            Row(
                f"precision.throughput_vs_fp32.{shape}",
                float(spent["fp32"].sum() / spent["range"].sum()),
                "x",
                _interval(spent["fp32"], spent["range"]),
                "fp32, tokens/s",
                float(steps[shape]["step_tokens"] / spent["fp32"].mean()),
                ">= 1.4",
            )
        )
    return rows + _controller_rows(arms["range"], seconds)


def _seconds(steps: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    return {arm: np.array(run["seconds"]) for arm, run in steps["arms"].items()}


def _controller_rows(ours: Mapping[str, Any], seconds: Mapping[str, Any]) -> list[Row]:
    spent = np.array(ours["controller"])
    share = "precision.controller_overhead_share"
    return [
        Row(
            share,
            float(spent.sum() / seconds["range"].sum()),
            "of a step",
            _interval(spent, seconds["range"]),
            bar="<= 0.03",
        ),
        Row(
            f"{share}.of_fp32_step",
            float(spent.sum() / seconds["fp32"].sum()),
            "of a step in fp32",
            _interval(spent, seconds["fp32"]),
        ),
        Row("precision.group_steps_share.fp32", ours["fp32_share"], "of groups x steps"),
        Row("precision.group_steps_share.bf16", 1 - ours["fp32_share"], "of groups x steps"),
        Row("precision.promotions", ours["num_promotions"], "groups", bar=">= 1"),
        Row("precision.demotions", ours["num_demotions"], "groups", bar=">= 1"),
    ]


def _interval(above: NDArray[np.float64], below: NDArray[np.float64]) -> tuple[float, float]:
    """95% of bootstrapped ratios of sums; a step's two times are drawn together."""
    chosen = np.random.default_rng(_SEED).integers(0, len(above), (_DRAWS, len(above)))
    low, high = np.percentile(above[chosen].sum(1) / below[chosen].sum(1), [2.5, 97.5])
    return float(low), float(high)


def failure_rows(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """From failure -> arm -> run: how many of the kinds each policy survived."""
    rows = []
    for arm in ARMS[1:]:
        count = sum(
            all(has_survived(runs[failure][arm], runs[failure]["fp32"]) for failure in failures)
            for failures in KINDS.values()
        )
        is_ours = arm == "range"
        rows.append(
            Row(
                "precision.provoked_failures_survived" + ("" if is_ours else f".{arm}"),
                count,
                f"of {len(KINDS)}",
                bar=f">= {len(KINDS)}" if is_ours else None,
            )
        )
    return rows


def render_failures(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What each arm did with each failure, as a Markdown table."""
    lines = [
        "| failure | arm | survived | held-out loss | updates | skipped | loss scale | "
        "most groups in fp32 | groups x steps in fp32 | end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for failure, arms in runs.items():
        for arm in ARMS:
            run = arms[arm]
            survived = "reference"
            if arm != "fp32":
                survived = "yes" if has_survived(run, arms["fp32"]) else "**no**"
            scales = " to ".join(f"2^{np.log2(scale):.0f}" for scale in run["loss_scales"])
            weights = "" if run["is_finite"] else "weights not finite; "
            end = "stopped" if run["error"] else "finished"
            lines.append(
                f"| {failure} | {arm} | {survived} | {_number(run['final_loss'])} | "
                f"{run['num_updates']} | {run['num_skipped']} | {scales} | "
                f"{run['max_promoted']} | {run['fp32_share']:.0%} | {weights}{end} |"
            )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not np.isfinite(value) else f"{value:.4f}"
