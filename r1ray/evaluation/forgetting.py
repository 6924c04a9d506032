"""What a new version of a model has forgotten: both versions on the same held-out problems."""

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1ray.config.schema import EvaluateConfig
from r1ray.data.reasoning import Problem
from r1ray.evaluation.accuracy import (
    Answer,
    Proportion,
    answer_problems,
    paired_difference,
    proportion,
)
from r1ray.models.checkpoint import load_model
from r1ray.models.tokenizer import Tokenizer

__all__ = ["FamilyChange", "compare", "find_forgotten", "measure_changes", "render_changes"]

REPLIES_NAME = "replies.jsonl"


@dataclass(frozen=True)
class FamilyChange:
    """One family's accuracy, in shares.

    Attributes:
        was_taught: to the old version.
        change: (mean of new - old, its 95% interval low, high), over the same problems.
    """

    family: str
    was_taught: bool
    old: Proportion
    new: Proportion
    change: tuple[float, float, float]


def measure_changes(
    config: EvaluateConfig,
    old_dir: Path,
    new_dir: Path,
    problems: Sequence[Problem],
    system_prompt: str,
    taught: Collection[str],
    out_dir: Path,
    on_problem: Callable[[str, int], None] = lambda *_: None,
) -> list[FamilyChange]:
    """Ask both model directories `problems`, and write their replies into `out_dir`.

    Args:
        taught: names of the families that the old version was taught.
        on_problem: called with `old` or `new` and the number of problems it has answered.
    """
    answers: dict[str, list[Answer]] = {}
    with (out_dir / REPLIES_NAME).open("w", encoding="utf-8") as stream:
        for name, directory in (("old", old_dir), ("new", new_dir)):

            def count(finished: int, name: str = name) -> None:
                on_problem(name, finished)

            answers[name] = answer_problems(
                load_model(directory),
                Tokenizer(directory),
                problems,
                system_prompt,
                max_new_tokens=config.max_new_tokens,
                max_concurrency=config.max_concurrency,
                on_finish=count,
            )
            for answer in answers[name]:
                record = {"model": name, **dataclasses.asdict(answer)}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return compare(answers["old"], answers["new"], taught)


def compare(
    old: Sequence[Answer], new: Sequence[Answer], taught: Collection[str]
) -> list[FamilyChange]:
    """The change of every family, in the order in which they first occur.

    Args:
        old, new: to the same problems, in the same order.
    """
    changes = []
    for family in dict.fromkeys(answer.family for answer in old):
        before, after = (
            [answer.is_correct for answer in answers if answer.family == family]
            for answers in (old, new)
        )
        changes.append(
            FamilyChange(
                family=family,
                was_taught=family in taught,
                old=proportion(before),
                new=proportion(after),
                change=paired_difference(after, before),
            )
        )
    return changes


def find_forgotten(changes: Sequence[FamilyChange], max_points: float) -> list[FamilyChange]:
    """The families of which more than `max_points` points of accuracy are gone."""
    return [item for item in changes if -100 * item.change[0] > max_points + 1e-9]


def render_changes(changes: Sequence[FamilyChange], max_points: float) -> str:
    """A Markdown table of all families, and which of them lost too much."""
    forgotten = find_forgotten(changes, max_points)
    lines = ["| family | | published | new | points | |", "|---|---|---|---|---|---|"]
    for item in changes:
        mean, low, high = (100 * value for value in item.change)
        lines.append(
            f"| {item.family} | {'taught before' if item.was_taught else 'new'} | "
            f"{item.old.value:.1%} | {item.new.value:.1%} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] "
            f"of {item.old.count} problems | {'**forgotten**' if item in forgotten else ''} |"
        )
    return "\n".join(lines) + "\n"
