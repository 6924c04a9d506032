"""Layered memory: the largest model that trains, or serves, under a budget of resident memory.

Sizes are numbers of layers of SmolLM2's widths; the largest one whose peak stays within the budget
is found by doubling and bisection. With tiers the search ends where the factor that is looked for
is well passed: the true one may be larger. Time is compared at the largest size that fits without.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.benchmarks.layers_child import Outcome, Trial, build_shape, write_model
from r1ray.models import Decoder

__all__ = ["BUDGETS_MIB", "measure_layers"]

BUDGETS_MIB = {"train": 512, "serve": 256}
_ENOUGH = 6.0  # times the untiered size
_TIMEOUT_S = 900


def measure_layers(task: Literal["train", "serve"]) -> dict[str, Any]:
    """Largest sizes, in parameters, and times of `task`, with and without tiers."""
    budget_bytes = BUDGETS_MIB[task] << 20
    with tempfile.TemporaryDirectory(prefix="r1ray-layers-", dir=".") as directory:
        trials = _Trials(task, Path(directory).resolve(), budget_bytes)
        plain = _bisect(lambda layers: trials.fits(layers, is_tiered=False))
        enough = next(
            count
            for count in itertools.count(plain)
            if trials.count_parameters(count) >= _ENOUGH * trials.count_parameters(plain)
        )
        largest = _bisect(
            lambda layers: layers <= enough and trials.fits(layers, is_tiered=True), start=plain
        )
        return {
            "is_capped": largest == enough,
            "budget_mib": BUDGETS_MIB[task],
            "plain_layers": plain,
            "plain_parameters": trials.count_parameters(plain),
            "tiered_layers": largest,
            "tiered_parameters": trials.count_parameters(largest),
            "plain": asdict(trials.run(plain, is_tiered=False)),
            "tiered": asdict(trials.run(plain, is_tiered=True)),
            "tiered_cold": asdict(trials.run(plain, is_tiered=True, is_cold=True)),
            "largest": asdict(trials.run(largest, is_tiered=True)),
            "largest_cold": asdict(trials.run(largest, is_tiered=True, is_cold=True)),
        }


class _Trials:
    """Runs of one task, each in a process of its own; results are kept."""

    def __init__(self, task: Literal["train", "serve"], directory: Path, budget_bytes: int) -> None:
        self._task, self._directory, self._budget_bytes = task, directory, budget_bytes
        self._outcomes: dict[tuple[int, bool, bool], Outcome] = {}

    def count_parameters(self, num_layers: int) -> int:
        with torch.device("meta"):
            model = Decoder(build_shape(num_layers))
        return sum(parameter.numel() for parameter in model.parameters())

    def fits(self, num_layers: int, *, is_tiered: bool) -> bool:
        outcome = self.run(num_layers, is_tiered=is_tiered)
        is_within = outcome.error is None and outcome.grown_bytes <= self._budget_bytes
        print(
            f"  {self._task}, {num_layers} layers, {'tiered' if is_tiered else 'plain'}: "
            f"{outcome.grown_bytes / 2**20:.0f} MiB, {outcome.seconds:.2f} s"
            + ("" if is_within else ", does not fit"),
            flush=True,
        )
        return is_within

    def run(self, num_layers: int, *, is_tiered: bool, is_cold: bool = False) -> Outcome:
        key = (num_layers, is_tiered, is_cold)
        if key not in self._outcomes:
            path = self._directory / str(num_layers)
            if not path.exists():
                write_model(path, num_layers)
            budget = self._budget_bytes if is_tiered else None
            trial = Trial(self._task, str(path), budget, is_cold)
            command = [sys.executable, "-m", "jobs.benchmarks.layers_child"]
            found = subprocess.run(
                [*command, json.dumps(asdict(trial))],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=_TIMEOUT_S,
            )
            self._outcomes[key] = Outcome(**json.loads(found.stdout.splitlines()[-1]))
        return self._outcomes[key]


def _bisect(fits: Callable[[int], bool], start: int = 1) -> int:
    """The largest number of layers that fits, 0 if none does; they fit up to it, not beyond."""
    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
