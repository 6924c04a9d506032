"""The continual benchmark: its parts, each stored when it has been measured, and the record."""

import dataclasses
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.continual_arms import (
    ARMS,
    FIRST,
    JOINT,
    Scale,
    build_model,
    learn,
    learn_all,
    score,
)
from jobs.benchmarks.continual_report import Run, plot, render_arms, rows
from jobs.benchmarks.continual_tasks import FAMILIES
from jobs.benchmarks.parts import StoredParts
from r1ray.errors import ConfigError
from r1ray.evaluation.record import build_record, describe_run, render_table, write_json
from r1ray.models.checkpoint import save_model

__all__ = ["ContinualBenchmark"]

_TARGET = Path("docs/benchmarks")
_NAMES = (*ARMS, JOINT)


class ContinualBenchmark:
    """What `jobs.bench_continual` measures; every result is kept in `work`."""

    def __init__(self, work: Path, scale: Scale, num_seeds: int, num_processes: int) -> None:
        self._work, self._scale, self._num_processes = work, scale, num_processes
        self._seeds = range(num_seeds)
        self._parts = StoredParts(work)

    def measure(self, only: Sequence[str] | None) -> None:
        """Measure the parts that are missing of these arms, several at once.

        Raises:
            ConfigError: there is no such arm.
        """
        unknown = sorted(set(only or ()) - set(_NAMES))
        if unknown:
            raise ConfigError(f"--only: no arm {unknown[0]!r}; choose from {', '.join(_NAMES)}")
        for names in (["first"], only or _NAMES):  # all arms begin with what was learned first
            parts = [(name, seed) for seed in self._seeds for name in names]
            missing = [part for part in parts if not self._parts.has(self._part(*part))]
            with ProcessPoolExecutor(
                self._num_processes, multiprocessing.get_context("spawn"), _use_one_thread
            ) as pool:
                started = [
                    (part, pool.submit(_measure, self._work, self._scale, *part))
                    for part in missing
                ]
                for (name, seed), future in started:
                    print(f"  {name}, seed {seed}: {future.result()['accuracies'][-1]}", flush=True)

    def _part(self, name: str, seed: int) -> str:
        return _part(self._scale, name, seed)

    def _run(self, name: str, seed: int) -> Run:
        """With the time of the first family, which is learned once for all who learn in a row."""
        run = Run(**self._parts.read(self._part(name, seed)))
        if name == JOINT:
            return run
        first = Run(**self._parts.read(self._part("first", seed)))
        return dataclasses.replace(run, seconds=[*first.seconds, *run.seconds])

    @property
    def is_complete(self) -> bool:
        """Whether all arms are there."""
        return all(
            self._parts.has(self._part(name, seed)) for name in _NAMES for seed in self._seeds
        )

    def file_record(self, command: str) -> str:
        """Write the record, its tables and the picture; returns the tables."""
        runs = {name: [self._run(name, seed) for seed in self._seeds] for name in _NAMES}
        found = rows(runs)
        record = build_record("continual", command, found, self._parts.circumstances())
        _TARGET.mkdir(parents=True, exist_ok=True)
        details = {name: [run.accuracies for run in items] for name, items in runs.items()}
        write_json(_TARGET / "continual.json", {**record, "accuracies": details})
        plot(runs, _TARGET / "continual.png")
        tables = f"{render_table(found)}\n## By method\n\n{render_arms(runs)}"
        text = (
            f"# Continual learning\n\n{describe_run(record)}\n\n{tables}\n"
            f"![accuracy by family](continual.png)\n{_NOTES}"
        )
        (_TARGET / "continual.md").write_text(text, encoding="utf-8")
        return tables


def _part(scale: Scale, name: str, seed: int) -> str:
    return f"{name}_{seed}_{scale.num_steps}_steps_{scale.num_problems}_problems"


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _measure(work: Path, scale: Scale, name: str, seed: int) -> Any:
    measure = {"first": _learn_first, JOINT: _learn_jointly}.get(name, _learn_in_a_row)
    return StoredParts(work).once(_part(scale, name, seed), measure, work, scale, name, seed)


def _first_dir(work: Path, scale: Scale, seed: int) -> Path:
    return work / f"model_{seed}_{scale.num_steps}_steps"


def _learn_first(work: Path, scale: Scale, _: str, seed: int) -> dict[str, Any]:
    """The first family, with everything that any arm wants to remember of it."""
    out = _first_dir(work, scale, seed)
    with tempfile.TemporaryDirectory() as start:
        save_model(build_model(seed), start)
        seconds = learn(Path(start), list(FAMILIES)[:1], FIRST, scale, seed, out)
    return {"accuracies": [score(out, scale)], "seconds": [seconds], "memory_bytes": 0}


def _learn_in_a_row(work: Path, scale: Scale, name: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return learn_all(name, _first_dir(work, scale, seed), scale, seed, Path(directory))


def _learn_jointly(_: Path, scale: Scale, name: str, seed: int) -> dict[str, Any]:
    """All families at once, in as many steps as the others take together."""
    del name
    with tempfile.TemporaryDirectory() as directory:
        start, out = Path(directory, "start"), Path(directory, "out")
        save_model(build_model(seed), start)
        seconds = learn(start, list(FAMILIES), ARMS["naive"], scale, seed, out)
        return {"accuracies": [score(out, scale)], "seconds": [seconds], "memory_bytes": 0}


_NOTES = """
- Four families of strings, learned one after the other by a decoder of 3 layers and 0.6 million
  parameters that starts from random weights: reverse a word, sort digits, take every other letter,
  shift letters by three. Each has as many steps (64 samples each) in every method; with replay, a
  part of them are old samples, so that fewer are new. Held-out problems (greedy, exact) are the
  same for all.
- The first family is learned once a seed, and is where all methods but joint training begin. Joint
  training sees all data at once, for as many steps as the four take together.
- Forgetting is the best accuracy that a family ever had, less that in the end, over the first three
  families; the interval is from the least to the greatest seed. The new-task cost is that of the
  worst of the last three families, as soon as it was learned.
- A small model from random weights forgets everything; a pretrained one forgets less. The share of
  replay, the default's too, was chosen on these families (docs/experiments.md); EWC has one
  strength (100) and LoRA one rank (16) and the rate of the others: neither was searched.
- Time is that of learning all four, what is kept for the next family included (a reservoir of 4,096
  samples in Parquet, or the Fisher diagonal in float32; the first family keeps both, for all);
  several parts may have run at once.
"""
