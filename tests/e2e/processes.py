"""Running jobs as a user would: as processes, with their output kept."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

__all__ = ["REPOSITORY", "TINY_CONFIG", "free_port", "job_command", "run_job", "start_job", "stop"]

REPOSITORY = Path(__file__).parents[2]
TINY_CONFIG = "jobs/configs/tiny.yaml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def job_command(job: str, *overrides: str, config: str = TINY_CONFIG) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", "--config", config, *overrides]


def start_job(job: str, *overrides: str) -> subprocess.Popen[str]:
    """The running job, leader of a process group of its own."""
    return subprocess.Popen(
        job_command(job, *overrides),
        cwd=REPOSITORY,
        env=_environment(),
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
        env=_environment() | extra,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    """Signal the process group that `start_job` made, and wait for its leader."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(timeout=60)


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
