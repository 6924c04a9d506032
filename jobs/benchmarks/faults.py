"""Faults of a training run, caused for real, and what each cost.

On Ray: a thread waits for the run's first checkpoint, then causes the fault in processes that this
one's Ray started; the run goes on until it has finished or given up. The link is cut in a cell of
the exchange benchmark, which needs no Ray.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.benchmarks.exchange_cells import Cell
from jobs.benchmarks.exchange_data import build_small_model
from jobs.benchmarks.exchange_run import CellRunner
from jobs.benchmarks.links import Network
from jobs.cli import connected_to_ray
from r1ray.artifacts import Artifact
from r1ray.config import PipelineConfig, load_config
from r1ray.errors import ExchangeError
from r1ray.models.checkpoint import copy_tokenizer, save_model
from r1ray.pipeline import Pipeline

__all__ = ["FAULTS", "FaultReport", "cut_link", "measure_faults", "provoke", "small_disk"]

_DEADLINE_S = 180.0
_CHECKPOINTS = "*/checkpoints/*/checkpoint_manager_snapshot*"
_WORKER_NAME = "ray::RayTrainWo"
_CUT_AFTER_BYTES = 4_000_000
_DISK_BYTES = 1 << 30
_VOCAB_SIZE = 49_152
_CONFIG_PATH = "jobs/configs/demo.yaml"
_OVERRIDES = (
    "train.num_steps=120",
    "train.resources.checkpoint_every_steps=10",
    "train.exchange={type: delta4_async, sync_share: 0}",
)


@dataclass(frozen=True)
class FaultReport:
    """Attributes:
    recovery_s: from the fault, or from its end where it ends by itself, to the next step.
    lost_steps: steps that had to be done again.
    trained: the finished run.
    """

    fault: str
    recovery_s: float
    lost_steps: int
    trained: Artifact


def provoke(fault: str, config: PipelineConfig) -> FaultReport:
    """Train as `config` says while `FAULTS[fault]` happens after the first checkpoint.

    Raises:
        ExchangeError: training gave up.
    """
    pipeline = Pipeline(config)
    pipeline.prepare()
    root = Path(config.run.root) / config.run.name / "train"
    stalled_s: list[float] = []
    culprit = threading.Thread(
        target=lambda: stalled_s.append(_after_checkpoint(root, FAULTS[fault])), daemon=True
    )
    culprit.start()
    trained = pipeline.train()
    culprit.join(timeout=_DEADLINE_S)
    metrics = trained.manifest.metrics
    if metrics["recoveries"]:
        recovery = metrics["recoveries"][0]
        seconds = recovery["seconds"] - stalled_s[0]
        return FaultReport(fault, seconds, recovery["lost_steps"], trained)
    return FaultReport(fault, max(0.0, metrics["longest_step_s"] - stalled_s[0]), 0, trained)


def cut_link(runner: CellRunner, cell: Cell, *, seconds: float) -> float:
    """Run `cell`, pull one worker's cable for a while, and return how long the step took beyond.

    Raises:
        ExchangeError: the cell failed, or its workers ended with different weights.
    """

    def disturb(network: Network) -> None:
        while network.read_bytes(0).sent < _CUT_AFTER_BYTES:
            time.sleep(0.05)
        network.cut(1)
        time.sleep(seconds)
        network.restore(1)

    result = runner.run(cell, disturb)
    if not result["has_equal_weights"] or result["steps_done"] != cell.num_steps:
        raise ExchangeError(f"after the cut, {cell.name} did not end as it should")
    ends = [0.0, *result["ended_s"]]
    longest = max(end - begin for begin, end in itertools.pairwise(ends))
    if longest < seconds:
        raise ExchangeError(f"the cable was pulled, and no step of {cell.name} took {seconds:g} s")
    return longest - seconds


def restart_driver(root: Path, overrides: Sequence[str]) -> float:
    """End the driver by SIGTERM after a checkpoint, and give the same command again.

    Args:
        root: `run.root` of `overrides`; data is prepared there, and nothing trained.
    Returns:
        Seconds from the signal to the first step of the second run.
    Raises:
        ExchangeError: the second run failed, or did not go on from a checkpoint.
    """
    command = [sys.executable, "-m", "jobs.train", "--config", _CONFIG_PATH, *overrides]
    with _running(command) as first:
        _wait_for(lambda: any(root.glob(f"*/train/{_CHECKPOINTS}")), "checkpoint")
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        first.communicate()
    with _running(command) as second:
        assert second.stderr is not None, "it is a pipe"
        steps = (re.search(r"train: step (\d+)/", line) for line in second.stderr)
        found = next((match for match in steps if match), None)
        seconds = time.monotonic() - began
        second.communicate()
    if second.returncode != 0 or found is None or int(found[1]) == 1:
        raise ExchangeError(
            f"after SIGTERM the same command ended with {second.returncode}, its first step was "
            f"{found and found[1]}"
        )
    return seconds


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The process of `command`, its stderr kept; killed when the block is left or takes long."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    watchdog = threading.Timer(2 * _DEADLINE_S, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def measure_faults(work: Path, base_dir: Path, runner: CellRunner) -> dict[str, float]:
    """Seconds until training went on, by fault: a small model on this machine's Ray.

    Args:
        work: an empty directory for the runs.
        base_dir: a checkpoint whose tokenizer is used.
    """
    model_dir = work / "model"
    model_dir.mkdir(parents=True)
    save_model(build_small_model(_VOCAB_SIZE, 0), model_dir)
    copy_tokenizer(base_dir, model_dir)
    recoveries = {}
    with connected_to_ray():
        for fault in FAULTS:
            root = work / fault
            with small_disk(root, _DISK_BYTES) if fault == "disk_full" else nullcontext(root):
                config = load_config(_CONFIG_PATH, [*_OVERRIDES, *_locate(model_dir, root)])
                recoveries[fault] = provoke(fault, config).recovery_s
        config = load_config(_CONFIG_PATH, [*_OVERRIDES, *_locate(model_dir, work / "restarted")])
        Pipeline(config).prepare()
    recoveries["driver_restarted"] = restart_driver(
        work / "restarted", [*_OVERRIDES, *_locate(model_dir, work / "restarted")]
    )
    cell = Cell("faults", "delta4", 2, 50, 0, 60)
    recoveries["link_cut_10s"] = cut_link(runner, cell, seconds=10)
    return recoveries


def _locate(model_dir: Path, root: Path) -> list[str]:
    return [f"base.source={model_dir}", f"run.root={root}"]


def _after_checkpoint(root: Path, cause: Callable[[Path], float]) -> float:
    _wait_for(lambda: any(root.glob(_CHECKPOINTS)) and bool(_find_workers()), "checkpoint")
    return cause(root)


def _wait_for(is_there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {_DEADLINE_S:.0f} s")
        time.sleep(0.02)


def _find_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(_WORKER_NAME):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _kill(root: Path) -> float:
    """Kill one worker when the others wait for it in an exchange."""
    del root
    pid = _find_workers()[-1].pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(pid, signal.SIGKILL)
    return 1.0


def _stop(root: Path, seconds: float = 20.0) -> float:
    del root
    pid = _find_workers()[-1].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    return seconds


def _slow(root: Path, seconds: float = 5.0, slice_s: float = 0.02) -> float:
    """Let one worker run half of the time."""
    del root
    pid = _find_workers()[-1].pid
    end = time.monotonic() + seconds
    os.kill(pid, signal.SIGCONT)  # it is there
    with contextlib.suppress(ProcessLookupError):  # training may be over before
        while time.monotonic() < end:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(slice_s)
            os.kill(pid, signal.SIGCONT)
            time.sleep(slice_s)
    return slice_s


def _fill_disk(root: Path) -> float:
    """Fill the file system of the run's directory until a worker group has failed on it."""
    before = {process.pid for process in _find_workers()}
    ballast = root / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        deadline = time.monotonic() + _DEADLINE_S
        while before & {process.pid for process in _find_workers()}:
            if time.monotonic() > deadline:
                raise TimeoutError("no worker failed on the full disk")
            time.sleep(0.05)
    finally:
        ballast.unlink(missing_ok=True)
    return 0.0


FAULTS: dict[str, Callable[[Path], float]] = {
    "worker_killed": _kill,
    "worker_stopped_20s": _stop,
    "worker_half_speed": _slow,
    "disk_full": _fill_disk,
}


@contextlib.contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own, in memory, at `directory`; needs root.

    Raises:
        PermissionError: it cannot be mounted here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "r1ray", str(directory)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"cannot mount a small file system: {error}") from error
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True, timeout=10)
