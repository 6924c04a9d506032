"""Peak memory of a process and of all that it starts, by role, while a command runs.

What a process holds alone (anonymous pages) is told apart from all that is resident in it, which
counts the pages of Ray's object store that it has mapped, and that all processes share.
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
    """What a command took: the command's own process (the driver), and the largest Ray worker.

    Attributes:
        driver_bytes, worker_bytes: most anonymous memory.
        driver_resident_bytes, worker_resident_bytes: most resident memory, shared pages included.
    """

    seconds: float
    driver_bytes: int
    worker_bytes: int
    driver_resident_bytes: int
    worker_resident_bytes: int


def run_measured(command: Sequence[str], *, timeout_s: float) -> MemoryPeaks:
    """Run `command` and watch it; its output goes to this process's standard error.

    Raises:
        subprocess.CalledProcessError: it failed.
        subprocess.TimeoutExpired: it took too long, and was ended.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    private: dict[int, int] = defaultdict(int)
    resident: dict[int, int] = defaultdict(int)
    workers: set[int] = set()
    try:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            if time.monotonic() - started > timeout_s:
                raise subprocess.TimeoutExpired(command, timeout_s)
            for child in [root, *_children(root)]:
                anonymous, everything = _read_status(child.pid)
                private[child.pid] = max(private[child.pid], anonymous)
                resident[child.pid] = max(resident[child.pid], everything)
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
        driver_bytes=private[process.pid],
        worker_bytes=max((private[pid] for pid in workers), default=0),
        driver_resident_bytes=resident[process.pid],
        worker_resident_bytes=max((resident[pid] for pid in workers), default=0),
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
    """(anonymous, all) resident bytes of a process; zeros once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    values = {
        name: int(value.split()[0]) * 1024
        for name, value in (line.split(":", 1) for line in text.splitlines() if ":" in line)
        if name in ("RssAnon", "VmRSS")
    }
    return values.get("RssAnon", 0), values.get("VmRSS", 0)
