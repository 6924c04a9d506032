"""Peak memory of a process and of all that it starts, by role, while a command runs.

What a process holds alone (anonymous pages) is told apart from what it maps of Ray's object store,
which all of them share and whose size is fixed when Ray starts.
"""

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["MemoryPeaks", "run_measured"]

_POLL_S = 0.1


@dataclass(frozen=True)
class MemoryPeaks:
    """What a command took.

    Attributes:
        driver_bytes: largest anonymous memory of the command's own process.
        worker_bytes: the same of the largest Ray worker.
        shared_bytes: most pages of the object store that one process had mapped.
    """

    seconds: float
    driver_bytes: int
    worker_bytes: int
    shared_bytes: int


def run_measured(command: Sequence[str], *, timeout_s: float) -> MemoryPeaks:
    """Run `command` and watch it; its output goes to this process's standard error.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took too long, and was ended.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    peaks: dict[int, int] = defaultdict(int)
    workers: set[int] = set()
    shared = 0
    try:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            if time.monotonic() - started > timeout_s:
                raise subprocess.TimeoutExpired(command, timeout_s)
            for child in [root, *_children(root)]:
                anonymous, mapped = _read_status(child.pid)
                peaks[child.pid] = max(peaks[child.pid], anonymous)
                shared = max(shared, mapped)
                if child.pid not in workers and _is_worker(child.pid):
                    workers.add(child.pid)
            time.sleep(_POLL_S)
    finally:
        process.terminate()
        process.wait(timeout=60)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return MemoryPeaks(
        seconds=time.monotonic() - started,
        driver_bytes=peaks[process.pid],
        worker_bytes=max((peaks[pid] for pid in workers), default=0),
        shared_bytes=shared,
    )


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _is_worker(pid: int) -> bool:
    try:
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _read_status(pid: int) -> tuple[int, int]:
    """(anonymous, shared) resident bytes of a process; zeros once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    values = {
        name: int(value.split()[0]) * 1024
        for name, value in (line.split(":", 1) for line in text.splitlines() if ":" in line)
        if name in ("RssAnon", "RssShmem")
    }
    return values.get("RssAnon", 0), values.get("RssShmem", 0)
