"""docs/benchmarks/exchange.md: every cell, the losing ones too, the plots, and what they mean."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jobs.benchmarks.exchange_cells import RATES_MBIT
from jobs.benchmarks.exchange_report import (
    Results,
    find_cells,
    steady_arms,
    steps_to_target,
    times_to_target,
)
from r1ray.evaluation.record import Row, describe_run, render_table

__all__ = ["plot_bytes", "plot_losses", "render_arithmetic", "render_cells", "write_report"]

_COLORS = {
    "ddp_fp32": "#8c96a3",
    "ddp_bf16": "#b8a15a",
    "ddp_powersgd": "#c98b6b",
    "dense": "#5f6b7a",
    "delta4": "#90b4e0",
    "delta4_async": "#2b6cb0",
    "stream": "#1a365d",
}
_BITS = {"dense fp32": 32.0, "dense bf16": 16.0, "delta4": 3.53, "stream, H = 100": 4.125 / 100}


def write_report(
    record: Mapping[str, Any], rows: Sequence[Row], results: Results, target: Path
) -> str:
    """Write exchange.md and its plots into `target`; returns the table of the rows."""
    plot_losses(results, target / "exchange_loss.png")
    plot_bytes(results, target / "exchange_bytes.png")
    table = render_table(rows)
    (target / "exchange.md").write_text(
        f"# Exchange across slow links\n\n{describe_run(record)}\n\n"
        "![Loss over time](exchange_loss.png)\n\n![Bytes a step](exchange_bytes.png)\n\n"
        f"{table}\n## Every cell\n\n{render_cells(results)}\n"
        f"## Arithmetic\n\n{render_arithmetic()}\n{_NOTES}",
        encoding="utf-8",
    )
    return table


def render_cells(results: Results) -> str:
    """One line for the cells that differ in their seed alone: medians."""
    lines = [
        "| part | model | workers | Mbit/s | arm | seeds | steps | s a step | computing | waited | "
        "MB sent a step | s to target | final loss | accuracy |",
        "|" + "---|" * 14,
    ]
    steady = {arm for arm, share in steady_arms(results).items() if share == 1}
    keys = ("part", "model", "num_workers", "rate_mbit", "arm", "num_steps")
    for values in dict.fromkeys(tuple(cell[key] for key in keys) for cell in results):
        cells = find_cells(results, **dict(zip(keys, values, strict=True)))
        lines.append(_render_line(results, cells, steady))
    return "\n".join(lines) + "\n"


def render_arithmetic(num_parameters: float = 2e6) -> str:
    """t_x = 2(N-1)/N · P · bits / 8 / B: the least seconds on the wire, a step."""
    lines = [
        "| strategy | bits | workers | " + " | ".join(f"{rate} Mbit/s" for rate in RATES_MBIT),
        "|" + "---|" * (3 + len(RATES_MBIT)),
    ]
    for strategy, bits in _BITS.items():
        for workers in (2, 4):
            sent = 2 * (workers - 1) / workers * num_parameters * bits
            times = " | ".join(f"{sent / (rate * 1e6):.4f} s" for rate in RATES_MBIT)
            lines.append(f"| {strategy} | {bits:.4g} | {workers} | {times} |")
    return "\n".join(lines) + "\n"


def plot_losses(results: Results, path: Path) -> None:
    """Validation loss over the clock, all seeds, one panel a rate."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, rate in zip(panels, (200, 50), strict=True):
        for cell in find_cells(results, part="headline", rate_mbit=rate):
            axes.plot(
                [point["seconds"] for point in cell["curve"]],
                [point["loss"] for point in cell["curve"]],
                color=_COLORS[cell["arm"]],
                linewidth=1.2,
                label=cell["arm"] if cell["seed"] == 0 else None,
            )
        axes.set(title=f"4 workers, {rate} Mbit/s", xlabel="seconds", xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats per target token")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_bytes(results: Results, path: Path) -> None:
    """Bytes that a worker sends in a step, at the interface."""
    arms = list(_COLORS)
    sent = [
        statistics.median(
            cell["sent_per_step"]
            for cell in find_cells(results, arm=arm, num_workers=4, rate_mbit=200)
        )
        / 1e6
        for arm in arms
    ]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    bars = axes.bar([arm.replace("_", "\n") for arm in arms], sent, color=list(_COLORS.values()))
    axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.set(title="Sent by a worker in a step, 4 workers", ylabel="MB", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _render_line(results: Results, cells: Results, steady: set[str]) -> str:
    first = cells[0]

    def median(name: str) -> float:
        return statistics.median(cell[name] for cell in cells)

    same = {"num_workers": first["num_workers"], "model": first["model"]}
    alone = [cell["step_s"] for cell in find_cells(results, arm="alone", **same)]
    computing = f"{100 * alone[0] / median('step_s'):.0f}%" if alone else ""
    waits = [cell["waited_share"] for cell in cells]
    waited = "" if None in waits else f"{100 * statistics.median(waits):.0f}%"
    rate = "unlimited" if first["rate_mbit"] is None else first["rate_mbit"]
    is_capped = any(cell["steps_done"] < cell["num_steps"] for cell in cells)
    columns = [
        first["part"],
        first["model"],
        first["num_workers"],
        rate,
        first["arm"],
        len(cells),
        f"{first['num_steps']}{' (capped)' if is_capped else ''}",
        f"{median('step_s'):.3f}",
        computing,
        waited,
        f"{median('sent_per_step') / 1e6:.4g}",
        _render_time(results, cells, steady),
        "" if first["final_loss"] is None else f"{median('final_loss'):.4f}",
        "" if first["accuracy"] is None else f"{median('accuracy'):.2f}",
    ]
    return f"| {' | '.join(map(str, columns))} |"


def _render_time(results: Results, cells: Results, steady: set[str]) -> str:
    """Measured in the headline; `~`: computed from its steps, where they depend on no rate."""
    first = cells[0]
    if first["part"] == "headline":
        times = times_to_target(results, first["arm"], first["rate_mbit"])
        missed = sum(map(math.isinf, times))
        if missed:
            return f"missed by {missed} of {len(times)}"
        return f"{statistics.median(times):.1f}"
    if first["part"] == "grid" and first["arm"] in steady:
        return f"~{steps_to_target(results, first['arm']) * first['step_s']:.1f}"
    return ""


_NOTES = """
- Links: a network namespace a worker, veth pairs to one bridge, `tc tbf` at both ends, frames of
  1500 bytes without segmentation offload, queues of 50 ms. `link_rate` is the payload that bulk TCP
  gets; the difference to the nominal rate is headers. Traffic never leaves the machine.
- The processors that compute also carry the frames, a few microseconds each: what a network card
  would do. At 1 Gbit/s that, not the link, is the limit of several workers on 2 cores.
- The clock of a run starts when all workers are ready for the first step; nothing is left out. Step
  time is the whole run over its steps. Weights are copied aside every 5 steps and judged after the
  run; those of rank 0, which with `stream` are its local ones until the tail.
- Target: the validation loss of DDP fp32 at the end of its schedule with the same seed, + 1%.
  Ratios are taken seed by seed; value: their median; interval: least and greatest.
- `~`: steps to the target from the headline's 4 workers times the step time of the cell, for arms
  whose runs end in bit-identical weights at 50 and 200 Mbit/s (`same_weights_at_both_rates`).
- Computing: the time of a step of workers that exchange nothing (`alone`), over the step's.
- Bytes: what a worker sends through its interface, mean over workers and steps of a whole run, from
  before the workers connect: sizes, scales, headers, acknowledgements, checksums. `stream`'s share
  is over its streaming phase; `.whole_run` has its synchronous tail.
- Baselines: torch's DDP over gloo, tuned (buckets of 1 MiB, gradients as views, the number of
  target tokens known for free); `ddp_bf16` casts, all-reduces asynchronously and casts back in a
  hook of our own, since torch's refuses gloo; `ddp_powersgd` is torch's hook at rank 4 after a
  fifteenth of the run in plain steps.
- Quality: equal steps on unlimited links. Loss gap: final validation loss over `dense`'s of the
  same seed, - 1. SmolLM2's rows: SmolLM2-135M itself, 2 workers.
"""
