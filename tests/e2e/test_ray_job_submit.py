"""A stage submitted with `ray job submit` to a real cluster with token auth."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.processes import REPOSITORY, TINY_CONFIG, free_port
from tests.fakes import write_tiny_model

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Cluster:
    """A head node of this test's own, and the environment that reaches it."""

    dashboard: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        submit = ["job", "submit", "--address", self.dashboard, "--working-dir", "."]
        return subprocess.run(
            [RAY, *submit, "--", *entrypoint],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ports = {"--port": free_port(), "--dashboard-port": free_port()}
    options = [f"{name}={port}" for name, port in ports.items()]
    options += ["--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=true"]
    # A socket path below the temporary directory must stay under 108 characters.
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as home:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--temp-dir={home}", *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        found = Cluster(f"http://127.0.0.1:{ports['--dashboard-port']}", environment)
        try:
            _wait_until_ready(found, head)
            yield found
        finally:
            head.send_signal(signal.SIGTERM)  # with --block, the head ends what it started
            head.wait(timeout=60)


def _wait_until_ready(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while True:
        listed = subprocess.run(
            [RAY, "job", "list", "--address", cluster.dashboard],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if listed.returncode == 0:
            return
        assert head.poll() is None, "ray start ended early"
        assert time.monotonic() < deadline, listed.stderr[-2000:]
        time.sleep(1)


def test_submitted_stage_succeeds_and_leaves_its_artifact(cluster: Cluster, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", max_positions=1024)
    command = ["python", "-m", "jobs.base", "--config", TINY_CONFIG]
    overrides = [f"run.root={tmp_path}/runs", f"base.source={tmp_path}/model"]
    done = cluster.submit(*command, *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list((tmp_path / "runs" / "tiny" / "base").glob("*/manifest.json"))

    prepared = cluster.submit("python", "-m", "jobs.prepare", "--config", TINY_CONFIG, *overrides)
    assert prepared.returncode == 0, prepared.stdout[-3000:] + prepared.stderr[-3000:]
    assert list((tmp_path / "runs" / "tiny" / "prepare").glob("*/batches.parquet"))


def test_submitted_mistake_fails_the_job_with_the_reason(cluster: Cluster) -> None:
    done = cluster.submit("python", "-m", "jobs.base", "--config", TINY_CONFIG, "run.nme=x")
    assert done.returncode != 0
    assert "run.nme: unknown key" in done.stdout + done.stderr
