"""Running jobs as a user would: as processes, with their output kept."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = [
    "REPOSITORY",
    "TINY_CONFIG",
    "free_port",
    "job_command",
    "plain_environment",
    "run_job",
    "start_job",
    "stop",
    "until",
    "wait_for_checkpoint",
]

REPOSITORY = Path(__file__).parents[2]
TINY_CONFIG = "jobs/configs/tiny.yaml"


def free_port() -> int:
    """A port that nobody listens on, and that the system gives to no connection meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # below Linux's ephemeral ports
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def job_command(job: str, *overrides: str, config: str = TINY_CONFIG) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", "--config", config, *overrides]


def start_job(
    job: str, *overrides: str, extra: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """The running job, leader of a process group of its own.

    Args:
        extra: environment variables.
    """
    return subprocess.Popen(
        job_command(job, *overrides),
        cwd=REPOSITORY,
        env=plain_environment() | (extra or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests started in a shell's background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_job(
    job: str,
    *overrides: str,
    config: str = TINY_CONFIG,
    ray_address: str | None = None,
    timeout_s: float = 240,
) -> subprocess.CompletedProcess[str]:
    """The finished job, with stdout and stderr apart."""
    extra = {} if ray_address is None else {"RAY_ADDRESS": ray_address}
    return subprocess.run(
        job_command(job, *overrides, config=config),
        cwd=REPOSITORY,
        env=plain_environment() | extra,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    """Signal the process group that `start_job` made, and wait for its leader."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(timeout=60)


def until(
    condition: Callable[[], object],
    seconds: float = 60,
    process: subprocess.Popen[str] | None = None,
) -> None:
    """Return once `condition` holds, while `process` runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.stdout.read() if process.stdout else "the process ended")
        assert time.monotonic() < deadline, f"the condition did not come true in {seconds} s"
        time.sleep(0.05)


def wait_for_checkpoint(train: Path, process: subprocess.Popen[str] | None = None) -> None:
    """Return once Ray Train knows of a checkpoint of a run in `train`, which has not finished."""
    until(lambda: [*train.glob("*/checkpoints/*/checkpoint_manager_snapshot*")], 180, process)


def plain_environment() -> dict[str, str]:
    """This process's, without what it says of Ray."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
