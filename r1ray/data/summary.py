"""What `prepare` made, for a person to look at: a table and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r1ray.data.length_sketch import LengthSketch

__all__ = ["plot_summary", "render_summary"]

_MAX_CEILINGS = 24  # rows of the table of ceilings; more are thinned out


def render_summary(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown tables: rows, tokens and padding; batches by ceiling."""
    sketch = LengthSketch(bits=None)
    sketch.counts.update(dict(zip(*_histogram(summary), strict=True)))
    pairs = [
        ("rows read", f"{summary['num_rows']:,}"),
        ("quarantined", f"{summary['num_quarantined']:,}"),
        ("over-long (by prepare.overflow)", f"{summary['num_over_long']:,}"),
        ("pieces without a target, dropped", f"{summary['num_dropped_pieces']:,}"),
        ("samples", f"{summary['num_samples']:,}"),
        *_replayed(summary),
        ("tokens", f"{summary['num_tokens']:,}"),
        ("targets among them", f"{summary['num_targets'] / summary['num_tokens']:.1%}"),
        (
            "length: median, 90%, longest",
            ", ".join(f"{sketch.quantile(share):,}" for share in (0.5, 0.9, 1.0)),
        ),
        ("batches", f"{summary['num_batches']:,} ({summary['batching']})"),
        ("largest batch", f"{summary['max_batch_tokens']:,} tokens"),
        ("padding", f"{summary['padding_share']:.2%} of the computed tokens"),
    ]
    if len(summary["fits"]) > 1:
        pairs.append(("ceilings fitted anew", f"{len(summary['fits']) - 1} times"))
    pairs += [
        (f"ignored field {name}".replace("|", "\\|"), f"{count:,} rows")
        for name, count in summary["ignored_fields"].items()
    ]
    table = _table(("", "value"), pairs)
    per_ceiling = list(summary["batches_per_ceiling"].items())
    step = -(-len(per_ceiling) // _MAX_CEILINGS)
    shown = [
        (f"{int(chunk[0][0]):,}" + (f" to {int(chunk[-1][0]):,}" if len(chunk) > 1 else ""), chunk)
        for chunk in (
            per_ceiling[start : start + step] for start in range(0, len(per_ceiling), step)
        )
    ]
    batches = [(name, f"{sum(count for _, count in chunk):,}") for name, chunk in shown]
    return table + "\n" + _table(("ceiling (tokens)", "batches"), batches)


def _replayed(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of earlier data sets; none without replay."""
    count = summary.get("num_replayed")
    return [] if count is None else [("replayed samples besides", f"{count:,}")]


def plot_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Length histogram with the ceilings, and batches per ceiling, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    lengths, counts = _histogram(summary)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.6), layout="constrained", sharex=True)
    is_wide = lengths[-1] > 8 * lengths[0]
    space = np.geomspace if is_wide else np.linspace
    edges = space(max(1, lengths[0] * 0.98), lengths[-1] * 1.02, 61)
    top.hist(lengths, bins=edges, weights=counts, color="#9db7d5")
    ceilings = summary["fits"][-1]["ceilings"] if summary["fits"] else []
    for ceiling in ceilings:
        top.axvline(ceiling, color="#dd6b20", linewidth=0.8)
    marks = f"; {len(ceilings)} bucket ceilings" if ceilings else ""
    padding = f"{summary['padding_share']:.2%} padding"
    top.set(
        title=f"{summary['num_samples']:,} samples ({summary['batching']}{marks}; {padding})",
        ylabel="samples",
        xscale="log" if is_wide else "linear",
    )
    places = [int(ceiling) for ceiling in summary["batches_per_ceiling"]]
    bottom.vlines(
        places, 0, list(summary["batches_per_ceiling"].values()), color="#2b6cb0", linewidth=3
    )
    bottom.set(xlabel="tokens in a sample, or columns of a batch", ylabel="batches", ylim=(0, None))
    bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _histogram(summary: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    lengths = [int(length) for length in summary["lengths"]]
    return lengths, list(summary["lengths"].values())


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    wide = max(len(row[0]) for row in [head, *rows])
    narrow = max(len(row[1]) for row in [head, *rows])
    lines = [
        f"| {head[0]:<{wide}} | {head[1]:>{narrow}} |",
        f"|{'-' * (wide + 2)}|{'-' * (narrow + 1)}:|",
    ]
    lines += [f"| {name:<{wide}} | {value:>{narrow}} |" for name, value in rows]
    return "\n".join(lines) + "\n"
