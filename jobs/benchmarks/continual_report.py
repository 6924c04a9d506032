"""What the continual benchmark's accuracies say: forgetting, transfer, cost; rows, table, picture.

With a[i][j] the accuracy on family j after i of T families:

    forgetting         mean over j < T of (max over j <= i < T of a[i][j]) - a[T][j]
    backward transfer  mean over j < T of a[T][j] - a[j][j]
    new-task cost      a[j][j] of naive less a[j][j], the worst family after the first

Source: Chaudhry et al. 2018, arXiv:1801.10112; Lopez-Paz and Ranzato 2017, arXiv:1706.08840.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from jobs.benchmarks.continual_arms import DEFAULT, JOINT
from r1ray.evaluation.record import Row

__all__ = ["Run", "plot", "render_arms", "rows"]


@dataclass(frozen=True)
class Run:
    """One arm of one seed.

    Attributes:
        accuracies: by family, after each one that was learned; of joint training, at its end.
        seconds: of learning each one, what it leaves for the next included.
        memory_bytes: kept beside the model in the end.
    """

    accuracies: Sequence[Mapping[str, float]]
    seconds: Sequence[float]
    memory_bytes: int

    @property
    def families(self) -> list[str]:
        return list(self.accuracies[0])

    @property
    def average_accuracy(self) -> float:
        """Over all families, in the end."""
        return fmean(self.accuracies[-1].values())

    @property
    def forgetting(self) -> float:
        """Of the families before the last."""
        return fmean(
            max(after[family] for after in self.accuracies[at:-1]) - self.accuracies[-1][family]
            for at, family in enumerate(self.families[:-1])
        )

    @property
    def backward_transfer(self) -> float:
        """Of the families before the last."""
        return fmean(
            self.accuracies[-1][family] - self.accuracies[at][family]
            for at, family in enumerate(self.families[:-1])
        )

    @property
    def learned(self) -> list[float]:
        """Accuracy on each family after the first, as soon as it was learned."""
        return [self.accuracies[at][name] for at, name in enumerate(self.families) if at > 0]


def _new_task_cost(runs: Sequence[Run], naive: Sequence[Run]) -> float:
    """Worst family, means over the seeds."""
    mine, theirs = (
        [fmean(of) for of in zip(*[r.learned for r in x], strict=True)] for x in (runs, naive)
    )
    return max(before - after for after, before in zip(mine, theirs, strict=True))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def rows(runs: Mapping[str, Sequence[Run]]) -> list[Row]:
    """The rows of the record; intervals are from the least to the greatest seed."""
    naive, default = runs["naive"], runs[DEFAULT]
    forgotten = {
        name: [run.forgetting for run in items] for name, items in runs.items() if name != JOINT
    }
    found = [
        Row(
            "continual.naive_forgetting",
            fmean(forgotten["naive"]),
            "share",
            _interval(forgotten["naive"]),
            bar=">= 0.15",
        ),
        Row(
            "continual.default_forgetting",
            fmean(forgotten[DEFAULT]),
            "share",
            _interval(forgotten[DEFAULT]),
            "naive fine-tuning",
            fmean(forgotten["naive"]),
            "<= 0.03",
        ),
        Row(
            "continual.default_new_task_cost",
            _new_task_cost(default, naive),
            "share",
            None,
            "naive fine-tuning, accuracy on new families",
            fmean(value for run in naive for value in run.learned),
            "<= 0.03",
        ),
    ]
    for name, items in runs.items():
        values = [run.average_accuracy for run in items]
        found.append(
            Row(f"continual.{name}_average_accuracy", fmean(values), "share", _interval(values))
        )
    return found


def render_arms(runs: Mapping[str, Sequence[Run]]) -> str:
    """A Markdown table, a method a line: means over the seeds."""
    lines = [
        "| method | accuracy in the end | forgetting | backward transfer | new families, when "
        "learned | time against naive | kept for the next |",
        "|---|---|---|---|---|---|---|",
    ]
    naive_s = fmean(sum(run.seconds) for run in runs["naive"])
    for name, items in runs.items():
        cost = fmean(sum(run.seconds) for run in items) / naive_s
        title = f"{name} (default)" if name == DEFAULT else name
        if name == JOINT:
            accuracy = fmean(run.average_accuracy for run in items)
            lines.append(f"| {title} | {accuracy:.1%} | | | | {cost:.2f} | all data |")
            continue
        accuracy, forgetting, transfer = (
            fmean(getattr(run, field) for run in items)
            for field in ("average_accuracy", "forgetting", "backward_transfer")
        )
        learned = fmean(value for run in items for value in run.learned)
        kept = fmean(run.memory_bytes for run in items) / 1024
        lines.append(
            f"| {title} | {accuracy:.1%} | {100 * forgetting:.1f} points | {100 * transfer:+.1f} | "
            f"{learned:.1%} | {cost:.2f} | {kept:,.0f} KiB |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Accuracy on each family in the end, a bar a method, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    families = runs["naive"][0].families
    figure, axes = plt.subplots(figsize=(10, 3.6))
    width = 0.8 / len(runs)
    for at, (name, items) in enumerate(runs.items()):
        heights = [fmean(run.accuracies[-1][family] for run in items) for family in families]
        places = [place + (at - len(runs) / 2 + 0.5) * width for place in range(len(families))]
        axes.bar(places, heights, width, label=name)
    axes.set_xticks(range(len(families)), [f"{n}: {name}" for n, name in enumerate(families, 1)])
    axes.set_ylabel("accuracy after all four")
    axes.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
