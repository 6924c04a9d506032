"""What the runs of `jobs.bench_fusion` say: shares of right answers, differences, and the verdict.

The rule, fixed before any run: in a regime, mid fusion is best where the 95% intervals of both
paired differences, mid - early and mid - late, lie above zero. The article's claim holds where it
is best in both regimes. All other outcomes are "not met", whichever arm wins.

An interval is a bootstrap over seeds and questions at once: both are drawn again with replacement,
the same ones for all arms, which were trained from the same decoder and asked the same questions.

Shape legend: R seeds, Q questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1ray.evaluation.record import Row

__all__ = ["Difference", "difference_rows", "plot_arms", "render_kinds", "result_rows"]

_RESAMPLES = 2000
_ABOVE_ZERO = 1e-9
REGIMES = ("frozen", "trained")
OTHERS = ("early", "late")
_COLORS = {"early": "#2b6cb0", "mid": "#dd6b20", "late": "#2e7d4f"}
Right = Mapping[str, Mapping[str, NDArray[np.bool_]]]
"""From regime -> arm -> whether each answer was right, [R, Q]."""


@dataclass(frozen=True)
class Difference:
    """Of two arms, in points: the first's share of right answers less the second's."""

    points: float
    low: float
    high: float


def compare(first_RQ: NDArray[np.bool_], second_RQ: NDArray[np.bool_]) -> Difference:
    """The paired difference with its 95% interval."""
    return _bootstrap(100.0 * (first_RQ.astype(float) - second_RQ))


def _bootstrap(values_RQ: NDArray[np.floating[Any]]) -> Difference:
    """Mean of `values_RQ` with its 95% interval.

    Source: percentile bootstrap, Efron 1979; of crossed factors, Owen 2007, arXiv:0711.2393.
    """
    rng = np.random.default_rng(0)
    seeds, questions = values_RQ.shape
    means = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        weights_R = np.bincount(rng.integers(0, seeds, seeds), minlength=seeds)
        weights_Q = np.bincount(rng.integers(0, questions, questions), minlength=questions)
        means[index] = weights_R @ values_RQ @ weights_Q / (seeds * questions)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(values_RQ.mean()), float(low), float(high))


def result_rows(right: Right, chance: float) -> list[Row]:
    """Right answers of every regime and arm, against chance for whoever sees no picture."""
    rows = []
    for regime, arms in right.items():
        for arm, right_RQ in arms.items():
            found = _bootstrap(100.0 * right_RQ)
            rows.append(
                Row(
                    f"fusion.accuracy_{regime}_{arm}",
                    found.points,
                    "%",
                    (found.low, found.high),
                    "question alone, at best",
                    100 * chance,
                )
            )
    return rows


def difference_rows(right: Right) -> list[Row]:
    """Mid against the others, the verdict of each regime, and the claim."""
    rows, verdicts = [], []
    for regime, arms in right.items():
        found = {other: compare(arms["mid"], arms[other]) for other in OTHERS}
        rows += [
            _row(f"fusion.mid_vs_{other}_{regime}", difference, other)
            for other, difference in found.items()
        ]
        hardest = min(found, key=lambda other: found[other].low)
        verdicts.append((found[hardest], f"{hardest}, {regime}"))
        rows.append(_row(f"fusion.verdict_{regime}", *verdicts[-1], has_bar=True))
    claim = min(verdicts, key=lambda verdict: verdict[0].low)
    if set(right) == set(REGIMES):
        rows.append(_row("fusion.mid_vs_best_other", *claim, has_bar=True))
    return rows


def _row(name: str, found: Difference, other: str, *, has_bar: bool = False) -> Row:
    bar, low = ("> 0", _ABOVE_ZERO) if has_bar else (None, None)
    interval = (found.low, found.high)
    return Row(name, found.points, "points", interval, other, None, bar, low)


def render_kinds(right: Right, kinds: Sequence[str], chances: Mapping[str, float]) -> str:
    """Right answers by kind of question: a Markdown table."""
    names = list(chances)
    lines = [
        "| regime | arm | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
        "| | *question alone, at best* | "
        + " | ".join(f"{100 * chances[name]:.1f}" for name in names)
        + " |",
    ]
    for regime, arms in right.items():
        for arm, right_RQ in arms.items():
            cells = []
            for name in names:
                found = _bootstrap(100.0 * right_RQ[:, [kind == name for kind in kinds]])
                cells.append(f"{found.points:.1f} [{found.low:.1f}, {found.high:.1f}]")
            lines.append(f"| {regime} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_arms(right: Right, kinds: Sequence[str], chances: Mapping[str, float], path: Path) -> None:
    """Right answers by kind of question, the three fusions side by side, a panel a regime."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(right), figsize=(5 * len(right), 3.4), sharey=True, layout="constrained"
    )
    names = list(chances)
    for axes, (regime, arms) in zip(np.atleast_1d(panels), right.items(), strict=True):
        for place, arm in enumerate(_COLORS):
            found = [
                _bootstrap(100.0 * arms[arm][:, [kind == name for kind in kinds]]) for name in names
            ]
            middles = [item.points for item in found]
            errors = [
                [item.points - item.low for item in found],
                [item.high - item.points for item in found],
            ]
            at = np.arange(len(names)) + 0.27 * (place - 1)
            axes.bar(at, middles, 0.25, yerr=errors, color=_COLORS[arm], label=arm)
        for index, name in enumerate(names):
            low, high = index - 0.42, index + 0.42
            axes.hlines(100 * chances[name], low, high, colors="#333333", linestyles="dotted")
        axes.set_xticks(range(len(names)), names)
        axes.set_title(f"decoder {regime}")
        axes.spines[["top", "right"]].set_visible(False)
    first: Any = np.atleast_1d(panels)[0]
    first.set_ylabel("right answers, %")
    first.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
