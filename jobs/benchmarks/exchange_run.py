"""Running one cell: its workers in their namespaces, and what became of them.

A worker that fails, or a cell that goes on for long after its cap, ends the whole cell. What the
workers wrote is judged here once they have ended: the curve of validation losses over the clock,
held-out accuracy, bytes at the interfaces, and whether all workers hold the same weights.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.exchange_cells import Cell, WorkerSpec, train_values
from jobs.benchmarks.exchange_data import Evaluator, ModelName
from jobs.benchmarks.exchange_worker import SNAPSHOTS_NAME, WorkerResult
from jobs.benchmarks.links import INTERFACE, Network, shaped_network
from r1ray.errors import ExchangeError
from r1ray.training.memory import KEEP_FREED_MEMORY

__all__ = ["CellRunner", "summarize"]

_PORT = 29_500
_GRACE_S = 240  # beyond the cap: start, the steps under way, and the last exchange
_POLL_S = 0.1
_LOG_CHARS = 2000


class CellRunner:
    """Runs cells on one task; keeps the evaluators."""

    def __init__(self, task_dir: Path, base_dir: Path) -> None:
        self._task_dir, self._base_dir = task_dir.resolve(), base_dir.resolve()
        self._evaluators: dict[ModelName, Evaluator] = {}

    def run(self, cell: Cell, disturb: Callable[[Network], None] | None = None) -> dict[str, Any]:
        """What the cell measured, as JSON values (`summarize`).

        Args:
            disturb: runs on a thread of its own, beside the workers.
        Raises:
            ExchangeError: a worker failed, or the cell did not end in time.
        """
        with tempfile.TemporaryDirectory(prefix="r1ray-exchange-") as directory:
            out_dir = Path(directory)
            with shaped_network(cell.num_workers, cell.rate_mbit) as network:
                spec = WorkerSpec(
                    cell,
                    train_values(cell),
                    address=network.address(0),
                    port=_PORT,
                    task_dir=str(self._task_dir),
                    base_dir=str(self._base_dir),
                    out_dir=directory,
                )
                (out_dir / "spec.json").write_text(json.dumps(spec.to_json()), encoding="utf-8")
                if disturb is not None:
                    threading.Thread(target=disturb, args=(network,), daemon=True).start()
                _run_workers(network, cell, out_dir)
            results = [
                WorkerResult(**json.loads((out_dir / f"rank{rank}.json").read_text()))
                for rank in range(cell.num_workers)
            ]
            snapshots = torch.load(out_dir / SNAPSHOTS_NAME)
        if not snapshots:
            return summarize(cell, results)
        evaluator = self._evaluator(cell.model)
        losses = [evaluator.loss(weights) for weights in snapshots]
        return summarize(cell, results, losses, evaluator.accuracy(snapshots[-1]))

    def _evaluator(self, model: ModelName) -> Evaluator:
        if model not in self._evaluators:
            self._evaluators[model] = Evaluator(model, self._task_dir, self._base_dir)
        return self._evaluators[model]


def summarize(
    cell: Cell,
    results: Sequence[WorkerResult],
    losses: Sequence[float] = (),
    accuracy: float | None = None,
) -> dict[str, Any]:
    """The figures of a cell: of rank 0's clock, and means over the workers.

    Args:
        losses, accuracy: of the weights that were kept, and of the last of them.
    """
    first = results[0]
    num_steps = len(first.ended_s)
    waits = [value for item in results for value in item.waited_s if value is not None]
    return {
        **dataclasses.asdict(cell),
        "steps_done": num_steps,
        "streaming_steps": cell.streaming_steps,
        "seconds": first.ended_s[-1],
        "step_s": first.ended_s[-1] / num_steps,
        "waited_share": sum(waits) / len(results) / first.ended_s[-1] if waits else None,
        "sent_per_step": _mean([item.sent[-1] for item in results]) / num_steps,
        "received_per_step": _mean([item.received[-1] for item in results]) / num_steps,
        "ended_s": first.ended_s,
        "sent": [_mean(values) for values in zip(*(item.sent for item in results), strict=True)],
        "curve": [
            {"step": step, "seconds": first.ended_s[step - 1], "loss": loss}
            for step, loss in zip(first.kept, losses, strict=True)
        ],
        "final_loss": losses[-1] if losses else None,
        "accuracy": accuracy,
        "digest": first.digest,
        "has_equal_weights": len({item.digest for item in results}) == 1,
    }


def _run_workers(network: Network, cell: Cell, out_dir: Path) -> None:
    environment = {
        **os.environ,
        **KEEP_FREED_MEMORY,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    command = [sys.executable, "-m", "jobs.benchmarks.exchange_worker"]
    processes = []
    for rank in range(cell.num_workers):
        arguments = ["--spec", str(out_dir / "spec.json"), "--rank", str(rank)]
        with (out_dir / f"rank{rank}.log").open("w") as log:
            processes.append(
                network.start(
                    rank,
                    [*command, *arguments],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    deadline = time.monotonic() + cell.cap_s + _GRACE_S
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                text = (out_dir / f"rank{rank}.log").read_text(errors="replace")
                raise ExchangeError(f"worker {rank} ended with {code}: {text[-_LOG_CHARS:]}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            raise ExchangeError(f"not done {_GRACE_S} s after the cap of {cell.cap_s:.0f} s")
        time.sleep(_POLL_S)


def _mean(values: Sequence[Any]) -> float:
    return float(sum(values)) / len(values)
