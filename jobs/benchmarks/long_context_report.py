"""The rows of docs/benchmarks/long_context.json with their bars, the table of tasks, the plot."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jobs.benchmarks.long_context_arms import PRECISIONS
from jobs.benchmarks.long_context_peers import find_best
from r1ray.evaluation.accuracy import paired_difference
from r1ray.evaluation.record import Row

__all__ = [
    "fidelity_rows",
    "memory_rows",
    "operator_rows",
    "plot_operator",
    "reading_rows",
    "render_gates",
    "render_passkeys",
    "render_tasks",
    "task_rows",
]

_BARS = {
    ("prefill", 8192): ">= 3.5",
    ("prefill", 16_384): ">= 6",
    ("decode", 16_384): ">= 5",
    ("decode", 65_536): ">= 20",
}
_COUNTS = 0.5  # what dense attention has to score on a task that counts
_MIN_TASKS = 4  # that have to count
_FIDELITY_BARS = {"perplexity_ratio": "<= 1.02", "needle_block_recall": ">= 0.97"}
_TASK_BARS = {"worst_task_drop": "<= 0.05"}
_MARKED_LAYERS = 0.675  # 7.5% of the heads, nine of which are in each layer
_COLORS = {"sparse": "#0b6e99", "dense": "#b5651d"}


def memory_rows(at_1024: Mapping[str, Any], growth: Mapping[str, int]) -> list[Row]:
    """Peaks at 1,024 tokens against the eager implementation's; growth of the sparse one."""
    peaks = at_1024["peak_bytes"]
    name = "long_context.attention_memory_share_1024"
    baseline = ("eager, MiB", peaks["eager"] / 2**20)
    rows = [
        Row(name, peaks["sparse"] / peaks["eager"], "share", None, *baseline, "<= 0.35"),
        Row(f"{name}.dense_flash", peaks["dense"] / peaks["eager"], "share", None, *baseline),
        Row("long_context.score_pairs_kept_1024", at_1024["pairs_kept"], "of n^2 pairs"),
    ]
    return rows + [
        Row(f"long_context.attention_memory.{length}", peak / 2**20, "MiB")
        for length, peak in growth.items()
    ]


def operator_rows(found: Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]) -> list[Row]:
    """Speed of sparse attention over dense, and how both grow."""
    rows = []
    for kind, lengths in found.items():
        for length, seconds in lengths.items():
            own_s = _of_a_layer(seconds)
            ratios = np.array(seconds["dense"]) / own_s
            name = f"long_context.{kind}_op_speedup_{length // 1024}k"
            rows.append(
                Row(
                    name,
                    _median(seconds["dense"]) / float(np.median(own_s)),
                    "x",
                    (float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))),
                    "dense, ms",
                    1000 * _median(seconds["dense"]),
                    _BARS.get((kind, length)),
                )
            )
    exponents = {arm: _exponent(found["prefill"], arm) for arm in ("sparse", "dense")}
    rows.append(
        Row(
            *("long_context.prefill_exponent", exponents["sparse"], "of n", None),
            *("dense", exponents["dense"], "<= 1.35"),
        )
    )
    return rows


def reading_rows(reads: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The whole model against peers, dense attention and re-reading."""
    rows = []
    for length, found in reads["by_length"].items():
        own, dense = (found[arm]["prefill_s"] for arm in ("sparse", "dense"))
        rows.append(Row(f"long_context.prefill_s.{length}", _median(own), "s", _range(own)))
        ratios = [slow / fast for slow, fast in zip(dense, own, strict=True)]  # read in turns
        bar = {16_000: ">= 3", 32_000: ">= 4"}.get(length)
        name = f"long_context.chunked_{length // 1000}k_vs_dense"
        baseline = ("dense, s", _median(dense))
        rows.append(Row(name, _median(ratios), "x", _range(ratios), *baseline, bar))
    again, own_16k = (
        sum(reads["reread"]),
        _median(reads["by_length"][16_000]["sparse"]["prefill_s"]),
    )
    name = "long_context.chunked_16k_vs_rereading"
    rows.append(Row(name, again / own_16k, "x", None, "re-reading, s", again))
    own_8k = reads["by_length"][8000]["sparse"]
    tokens_per_s = 1 / _median(own_8k["token_s"])
    rows.append(Row("long_context.decode_8k", tokens_per_s, "tokens/s"))
    rows += _peer_rows(peers)
    best = find_best(peers, 8000, "prefill_s")
    if best is not None:
        ratio = best[1] / _median(own_8k["prefill_s"])
        name = "long_context.prefill_8k_vs_best_peer"
        rows.append(Row(name, ratio, "x", None, f"{best[0]}, s", best[1], ">= 1.5"))
    best = find_best(peers, 8000, "decode_tokens_per_s", ["llama_cpp"])
    if best is not None:
        name = "long_context.decode_8k_vs_llamacpp"
        baseline = (f"{best[0]}, tokens/s", best[1])
        rows.append(Row(name, tokens_per_s / best[1], "x", None, *baseline, ">= 3"))
    return rows


def _peer_rows(peers: Iterable[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for peer in peers:
        found = peer.get("lengths", {}).get("8000", {})
        if "prefill_s" not in found:
            continue
        name, weights = peer["name"], peer["weights"]
        rows += [
            Row(f"long_context.peer_prefill_8k.{name}", found["prefill_s"], f"s ({weights})"),
            Row(f"long_context.peer_decode_8k.{name}", found["decode_tokens_per_s"], "tokens/s"),
        ]
    return rows


def fidelity_rows(fidelity: Mapping[str, Any]) -> list[Row]:
    """Perplexity, recall and agreement; bars alone of a precision that is not there."""
    rows = []
    for precision in PRECISIONS:
        suffix, found = _suffix(precision), fidelity.get(precision)
        if found is None:
            rows += _unmeasured(_FIDELITY_BARS, suffix)
            continue
        ratios = {length: sparse / dense for length, (dense, sparse) in found["perplexity"].items()}
        length = max(ratios, key=lambda at: ratios[at])
        name = f"long_context.perplexity_ratio{suffix}"
        baseline = (f"dense at {length}", found["perplexity"][length][0])
        bar = _FIDELITY_BARS["perplexity_ratio"]
        rows.append(Row(name, ratios[length], "x", None, *baseline, bar))
        name, bar = (
            f"long_context.needle_block_recall{suffix}",
            _FIDELITY_BARS["needle_block_recall"],
        )
        rows.append(_recall_row(name, found["recall"].values(), bar))
        for text, of_text in found["recall"].items():
            if of_text["looks"]:
                rows.append(_recall_row(f"{name}.{text}", [of_text]))
            mass = of_text["mass"]
            mass_name = f"long_context.attention_mass{suffix}.{text}"
            rows.append(Row(mass_name, statistics.mean(mass), "share", (min(mass), max(mass))))
        for length, share in found["agreement"].items():
            rows.append(Row(f"long_context.token_agreement{suffix}.{length}", share, "share"))
        for length, arms in found["passkeys"].items():
            dense, sparse = map(statistics.mean, arms)
            name = f"long_context.passkeys{suffix}.{length}"
            rows.append(Row(name, sparse, "share", None, "dense", dense))
    return rows


def task_rows(tasks: Mapping[str, Any]) -> list[Row]:
    """The worst of the tasks that count, and agreement; bars alone of what is not there."""
    rows = []
    for precision in PRECISIONS:
        suffix, found = _suffix(precision), tasks.get(precision)
        if found is None:
            rows += _unmeasured(_TASK_BARS, suffix)
            continue
        drops = {
            cell: _compare_texts(dense, sparse)
            for cell, (dense, sparse) in found["scores"].items()
            if _mean(dense) >= _COUNTS
        }
        num_tasks = len({task for task, _ in drops})
        name, bar = f"long_context.worst_task_drop{suffix}", _TASK_BARS["worst_task_drop"]
        if num_tasks < _MIN_TASKS:
            unit = f"not counted: dense attention can do {num_tasks} of {_MIN_TASKS} tasks"
            rows.append(Row(name, None, unit, bar=bar))
        else:
            worst = max(drops, key=lambda cell: drops[cell][0])
            drop, *interval = drops[worst]
            baseline = (
                f"dense, {worst[0]} at {worst[1]}",
                _mean(found["scores"][worst][0]),
            )
            rows.append(Row(name, drop, "of 1", (interval[0], interval[1]), *baseline, bar))
            rows.append(Row(f"long_context.tasks_that_count{suffix}", num_tasks, "of 6 tasks"))
        name = f"long_context.task_agreement{suffix}"
        rows.append(Row(name, found["agreement"], "share"))
    return rows


def _compare_texts(
    dense: Iterable[Sequence[float]], sparse: Iterable[Sequence[float]]
) -> tuple[float, float, float]:
    """The drop and its interval; texts, not questions about one text, are independent."""
    first, second = ([statistics.mean(text) for text in texts] for texts in (dense, sparse))
    return paired_difference(first, second)


def _mean(texts: Iterable[Sequence[float]]) -> float:
    return statistics.mean(statistics.mean(text) for text in texts)


def _recall_row(name: str, texts: Iterable[Mapping[str, Any]], bar: str | None = None) -> Row:
    pairs = [(text["looks"], text["found"]) for text in texts]
    looks, found = (sum(column) for column in zip(*pairs, strict=True))
    share = found / looks if looks else None
    return Row(name, share, "share", None, "heads that look there", float(looks), bar)


def _unmeasured(bars: Mapping[str, str], suffix: str) -> list[Row]:
    return [Row(f"long_context.{name}{suffix}", None, "", bar=bar) for name, bar in bars.items()]


def _suffix(precision: str) -> str:
    """Of a row's name: that which is served has none."""
    return "" if precision == "int8" else f".{precision}"


def render_passkeys(fidelity: Mapping[str, Any], depths: Iterable[float]) -> str:
    """Shares found by dense and sparse attention, by length and depth."""
    lines = [
        f"| tokens | attention | {' | '.join(f'depth {depth:.0%}' for depth in depths)} |",
    ]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for precision, found in fidelity.items():
        for length, arms in found["passkeys"].items():
            for kind, shares in zip(("dense", "sparse"), arms, strict=True):
                cells = [str(length), f"{kind}, {precision}", *(f"{share:.0%}" for share in shares)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_tasks(found: Mapping[str, Any], tasks: Iterable[str], lengths: Iterable[int]) -> str:
    """Mean scores of dense and sparse attention, and the drop, by task and length."""
    columns = [f"{precision} {kind}" for precision in found for kind in ("dense", "sparse", "drop")]
    lines = [
        f"| task | tokens | questions | texts | {' | '.join(columns)} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for task in tasks:
        for length in lengths:
            both = [each["scores"][task, length] for each in found.values()]
            some = both[0][0]
            cells = [task, str(length), str(sum(map(len, some))), str(len(some))]
            for dense, sparse in both:
                drop, low, high = _compare_texts(dense, sparse)
                cells += [f"{_mean(scores):.3f}" for scores in (dense, sparse)]
                cells.append(f"{drop:.3f} [{low:.3f}, {high:.3f}]")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_gates(training: Mapping[str, Any], points: int = 8) -> str:
    """Loss and recall of training gates over tokens; means of all steps up to each point."""
    steps = training["result"]
    lines = [
        f"{steps[-1]['tokens'] / 1e6:.1f} million tokens in {len(steps)} steps, "
        f"{training['seconds']:.0f} s on {training['device']}.\n",
        "| tokens | divergences, nats | of what units need, in chosen blocks |",
        "|---|---|---|",
    ]
    for part in np.array_split(np.arange(len(steps)), min(points, len(steps))):
        of_part = [steps[index] for index in part]
        loss, recall = (
            [step[name] for step in of_part if step[name] is not None]
            for name in ("loss", "recall")
        )
        cells = [
            f"{of_part[-1]['tokens']:,}",
            f"{statistics.mean(loss):.3f}" if loss else "",
            f"{100 * statistics.mean(recall):.1f}%" if recall else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_operator(
    found: Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]], path: Path
) -> None:
    """Times of both operators by length, on logarithmic axes."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, (kind, lengths) in zip(panels, found.items(), strict=True):
        for arm, color in _COLORS.items():
            times = [
                _of_a_layer(seconds) if arm == "sparse" else seconds[arm]
                for seconds in lengths.values()
            ]
            milliseconds = [1000 * float(np.median(item)) for item in times]
            axes.loglog(list(lengths), milliseconds, "o-", color=color, base=2)
            axes.annotate(
                arm,
                (list(lengths)[-1], milliseconds[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                color=color,
                va="center",
            )
        ticks = list(lengths)
        axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes.set(title=kind, xlabel="tokens", ylabel="ms a layer")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _exponent(lengths: Mapping[int, Mapping[str, Sequence[float]]], arm: str) -> float:
    """Slope of log(time) over log(length) from 8,192 tokens on."""
    long = [length for length in lengths if length >= 8192]
    seconds = [
        _of_a_layer(lengths[length]) if arm == "sparse" else lengths[length][arm] for length in long
    ]
    times = [math.log(float(np.median(item))) for item in seconds]
    return float(np.polyfit([math.log(length) for length in long], times, 1)[0])


def _of_a_layer(seconds: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """Of a layer on average, some of which have a head that chooses by the keys themselves."""
    share = _MARKED_LAYERS
    return share * np.array(seconds["marked"]) + (1 - share) * np.array(seconds["sparse"])


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
