"""Stages and the pipeline, submitted with `ray job submit` to a real cluster with token auth."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from r1ray.pipeline import STAGES
from tests.dashboard import named_metrics
from tests.e2e.processes import (
    REPOSITORY,
    TINY_CONFIG,
    free_port,
    plain_environment,
    until,
    wait_for_checkpoint,
)
from tests.fakes import write_tiny_model

RAY = str(Path(sys.executable).with_name("ray"))
NUM_STEPS = 120


@dataclass(frozen=True)
class Cluster:
    """A head node of this test's own, and the environment that reaches it."""

    dashboard: str
    environment: dict[str, str]
    home: Path
    metrics: str

    def submit(
        self, job: str, *overrides: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a job with the tiny configuration, and what it said."""
        entrypoint = ["python", "-m", f"jobs.{job}", "--config", TINY_CONFIG, *overrides]
        return self.run_cli("submit", "--working-dir", ".", *options, "--", *entrypoint)

    def run_cli(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job COMMAND`, with stderr in stdout."""
        return subprocess.run(
            [RAY, "job", command, "--address", self.dashboard, *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    def read(self, path: str) -> Any:
        """What the dashboard's API says."""
        header = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        found = httpx.get(f"{self.dashboard}{path}", headers=header, timeout=30)
        return found.raise_for_status().json()

    def list_metrics(self) -> set[str]:
        """Names of the samples that Prometheus would read now."""
        families = text_string_to_metric_families(httpx.get(self.metrics, timeout=30).text)
        return {sample.name for family in families for sample in family.samples}

    def list_shipped(self) -> dict[str, int]:
        """Sizes of the files of the working directory, as the cluster has unpacked them."""
        unpacked = self.home / "session_latest" / "runtime_resources" / "working_dir_files"
        [package] = [path for path in unpacked.iterdir() if path.is_dir()]
        return {
            str(path.relative_to(package)): path.stat().st_size
            for path in package.rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"  # made there
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    environment = plain_environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at the end nothing is worth waiting for
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    names = ("", "dashboard-", "dashboard-agent-listen-", "metrics-export-")
    ports = {f"--{name}port": free_port() for name in names}
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
        dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
        metrics = f"http://127.0.0.1:{ports['--metrics-export-port']}/metrics"
        found = Cluster(dashboard, environment, Path(home), metrics)
        try:
            agent = f"http://127.0.0.1:{ports['--dashboard-agent-listen-port']}"
            _wait_until_ready(found, agent, head)
            yield found
        finally:
            head.send_signal(signal.SIGTERM)  # with --block, the head ends what it started
            head.wait(timeout=60)


def _wait_until_ready(cluster: Cluster, agent: str, head: subprocess.Popen[bytes]) -> None:
    """Return once jobs are taken, and the agent is there that starts them."""
    header = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    urls = [f"{cluster.dashboard}/api/jobs/", f"{agent}/api/local_raylet_healthz"]

    def is_ready() -> bool:
        assert head.poll() is None, "ray start ended early"
        try:
            return all(httpx.get(url, headers=header, timeout=30).is_success for url in urls)
        except httpx.HTTPError:
            return False

    until(is_ready, 90)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of all runs: what one job has made is there for the next."""
    directory = tmp_path_factory.mktemp("submitted")
    write_tiny_model(directory / "model", max_positions=1024)
    return [
        f"run.root={directory / 'runs'}",
        f"base.source={directory / 'model'}",
        f"train.num_steps={NUM_STEPS}",
        "train.resources.checkpoint_every_steps=40",
        f"serve.port={free_port()}",
    ]


@pytest.fixture(scope="module")
def run(overrides: list[str]) -> Path:
    """The directory of the run's artifacts."""
    return Path(overrides[0].removeprefix("run.root=")) / "tiny"


@pytest.fixture(scope="module")
def prepared(cluster: Cluster, overrides: list[str]) -> str:
    """What the jobs said."""
    return _succeed(cluster.submit("base", *overrides), cluster.submit("prepare", *overrides))


@pytest.fixture(scope="module")
def trained(cluster: Cluster, overrides: list[str], run: Path, prepared: str) -> str:
    """What training said that goes on after `ray job stop`."""
    name, often = "stopped", "train.resources.checkpoint_every_steps=1"  # so that it takes long
    options = ["--no-wait", "--submission-id", name]
    started = cluster.submit("train", *overrides, often, options=options)
    assert started.returncode == 0, started.stdout
    wait_for_checkpoint(run / "train")
    wanted = {name for name in set().union(*named_metrics()) if name.startswith("ray_")}
    until(lambda: wanted <= cluster.list_metrics(), 60)
    stopped = cluster.run_cli("stop", name)
    assert stopped.returncode == 0, stopped.stdout
    assert f"Job '{name}' was stopped" in stopped.stdout
    assert not _list_manifests(run, "train"), "stopped too late to test anything"
    return _succeed(cluster.submit("train", *overrides))


def _succeed(*jobs: subprocess.CompletedProcess[str]) -> str:
    for job in jobs:
        assert job.returncode == 0, job.stdout[-6000:]
    return "".join(job.stdout for job in jobs)


def _list_manifests(run: Path, stage: str = "*") -> dict[str, str]:
    """Contents by stage."""
    files = run.glob(f"{stage}/*/manifest.json")
    return {file.parent.parent.name: file.read_text() for file in files}


def test_submitted_stages_leave_their_artifacts(prepared: str, run: Path) -> None:
    assert _list_manifests(run).keys() >= {"base", "prepare"}


def test_training_stopped_in_the_middle_goes_on_when_it_is_submitted_again(
    trained: str, run: Path
) -> None:
    found = re.search(r"resuming after step (\d+)", trained)
    assert found is not None, trained[-4000:]
    assert 0 < int(found[1]) < NUM_STEPS
    assert _list_manifests(run, "train")


def test_the_dashboard_names_runs_and_data_sets_after_the_run(
    cluster: Cluster, trained: str, run: Path
) -> None:
    found = {item["name"] for item in cluster.read("/api/train/v2/runs/v1")["train_runs"]}
    assert found == {
        f"tiny-train-{manifest.parent.name}" for manifest in run.glob("train/*/manifest.json")
    }
    jobs = [job["job_id"] for job in cluster.read("/api/jobs/") if job["job_id"]]
    datasets = [cluster.read(f"/api/data/datasets/{job}")["datasets"] for job in jobs]
    [name] = [item["dataset"] for of_job in datasets for item in of_job]
    assert name.startswith("tiny-prepare_")


def test_the_last_stages_and_the_pipeline_find_what_was_made(
    cluster: Cluster, overrides: list[str], run: Path, trained: str
) -> None:
    _succeed(cluster.submit("compress", *overrides), cluster.submit("evaluate", *overrides))
    made = _list_manifests(run)
    assert made.keys() == set(STAGES)
    said = _succeed(cluster.submit("pipeline", *overrides))
    for stage in STAGES:
        assert re.search(rf"{stage} \w+: finished earlier, nothing to do", said), said[-4000:]
    assert _list_manifests(run) == made
    assert "(expected: " in said, "the question went through the client"
    assert (run / "report.md").exists()


def test_a_submitted_server_answers_until_its_job_is_stopped(
    cluster: Cluster, overrides: list[str], trained: str
) -> None:
    name = "server"
    # Stopping kills at once, as it kills after 3 seconds what a busy machine could not end.
    killed = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "0"}})
    options = ["--no-wait", "--submission-id", name, "--runtime-env-json", killed]
    _succeed(cluster.submit("serve", *overrides, options=options))
    port = int(overrides[-1].removeprefix("serve.port="))
    health = f"http://127.0.0.1:{port}/health"

    def answers() -> bool:
        try:
            return httpx.get(health, timeout=30).is_success
        except httpx.HTTPError:
            return False

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(answers, 180)
    _succeed(cluster.run_cli("stop", name))
    until(lambda: not listens(), 60)


def test_a_submitted_mistake_fails_the_job_with_the_reason_in_its_last_lines(
    cluster: Cluster, overrides: list[str]
) -> None:
    done = cluster.submit("train", *overrides, "run.name=empty")
    assert done.returncode == 1  # what `ray job submit` makes of every failure
    assert "failed with exit code 2" in done.stdout
    last_lines = done.stdout[-1500:]
    assert "no finished 'base' artifact" in last_lines
    assert "run `python -m jobs.base` with the same configuration first" in last_lines
    assert "Traceback" not in done.stdout


def test_what_is_shipped_is_the_program_and_small(cluster: Cluster, prepared: str) -> None:
    shipped = cluster.list_shipped()
    folders = {Path(name).parts[0] for name in shipped}
    assert folders >= {"r1ray", "jobs", "deployments"}
    assert folders.isdisjoint({"tests", "docs", "runs", ".git", ".venv"})
    assert sum(shipped.values()) < 5_000_000
