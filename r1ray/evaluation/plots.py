"""The report's pictures: training by step, accuracy by stage, size and latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["plot_accuracy", "plot_size_latency", "plot_training"]

_COLORS = {"base": "#8c96a3", "tuned": "#2b6cb0"}
_QUANTIZED = "#dd6b20"


def plot_training(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss by step with its running mean; seconds by step, and which part was spent waiting."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    _draw_loss([record for record in history if record["loss"] is not None], left)
    steps = [record["step"] for record in history]
    waits = [record["exchange_wait_s"] for record in history]
    rest = [record["seconds"] - wait for record, wait in zip(history, waits, strict=True)]
    right.stackplot(
        steps,
        rest,
        waits,
        labels=("computing", "waiting for other workers"),
        colors=("#b8c4d2", _QUANTIZED),
    )
    right.set(title="Time by step, rank 0", xlabel="step", ylabel="seconds")
    right.legend(frameon=False, loc="lower left")
    right.spines[["top", "right"]].set_visible(False)
    _finish(figure, left, path)


def _draw_loss(finite: Sequence[Mapping[str, Any]], axes: Any) -> None:
    steps = [record["step"] for record in finite]
    losses = [record["loss"] for record in finite]
    means: list[float] = []
    for loss in losses:
        means.append(loss if not means else 0.8 * means[-1] + 0.2 * loss)
    axes.plot(steps, losses, color="#b8c4d2", linewidth=1, label="step")
    axes.plot(steps, means, color=_COLORS["tuned"], linewidth=2, label="running mean")
    axes.set(title="Training loss", xlabel="step", ylabel="nats per target token", yscale="log")
    axes.legend(frameon=False)


def _color(name: str) -> str:
    return _COLORS.get(name, _QUANTIZED)


def plot_accuracy(results: Mapping[str, Any], path: Path) -> None:
    """Held-out accuracy by family and overall, one bar a model, with 95% intervals."""
    families = list(next(iter(results.values()))["by_family"])
    groups = [*families, "all"]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(results)
    for index, (name, result) in enumerate(results.items()):
        shares = [result["by_family"][family] for family in families] + [result["accuracy"]]
        values = [100 * share["value"] for share in shares]
        errors = [
            [100 * (share["value"] - share["low"]) for share in shares],
            [100 * (share["high"] - share["value"]) for share in shares],
        ]
        places = [group + (index - (len(results) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, values, width, yerr=errors, capsize=2, label=name, color=_color(name))
    axes.set_xticks(range(len(groups)), [group.replace("_", "\n") for group in groups])
    axes.set(title="Held-out problems solved", ylabel="%", ylim=(0, 105))
    axes.legend(frameon=False)
    _finish(figure, axes, path)


def plot_size_latency(results: Mapping[str, Any], path: Path) -> None:
    """Bytes on disk, and prefill and decode latency, of every model."""
    names = list(results)
    panels = [
        ("Size on disk", "MB", [results[name]["weight_bytes"] / 1e6 for name in names]),
        ("Decode, one stream", "ms per token", _latencies(results, "decode_ms_per_token")),
        ("Prefill, 128 tokens", "ms", _latencies(results, "prefill_ms")),
    ]
    figure, all_axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
    for axes, (title, unit, values) in zip(all_axes, panels, strict=True):
        bars = axes.bar(names, values, color=[_color(name) for name in names])
        axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.set(title=title, ylabel=unit, ylim=(0, 1.15 * max(values)))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _latencies(results: Mapping[str, Any], key: str) -> list[float]:
    return [result["latency"][key] for result in results.values()]


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
