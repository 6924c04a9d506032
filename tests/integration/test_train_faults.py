"""Faults of training, caused for real on a local Ray."""

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from r1ray.artifacts import Artifact
from r1ray.config import PipelineConfig, load_config
from r1ray.errors import ExchangeError
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")


def _configure(directory: Path, *overrides: str) -> PipelineConfig:
    write_tiny_model(directory / "model", max_positions=1024)
    return load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={directory}",
            f"base.source={directory / 'model'}",
            "train.num_steps=60",
            "train.resources.checkpoint_every_steps=5",
            *overrides,
        ],
    )


def _kill_one_worker(after: Path, killed: list[int]) -> None:
    """Kill a training worker of this test's own Ray once the first checkpoint is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(after.glob("*/checkpoints/checkpoint_manager_snapshot*")):
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("ray::RayTrainWo"):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.05)


def _train_while_killing(directory: Path, *overrides: str) -> tuple[Artifact, list[int]]:
    pipeline = Pipeline(_configure(directory, *overrides))
    pipeline.prepare()
    killed: list[int] = []
    assassin = threading.Thread(
        target=_kill_one_worker, args=(directory / "tiny" / "train", killed), daemon=True
    )
    assassin.start()
    try:
        return pipeline.train(), killed
    finally:
        assassin.join(timeout=10)


def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    trained, killed = _train_while_killing(tmp_path)
    assert len(killed) == 1
    resumed_at = [
        int(record.message.rsplit(" ", 1)[1])
        for record in caplog.records
        if record.message.startswith("resuming after step")
    ]
    assert len(resumed_at) == 1
    assert resumed_at[0] >= 5
    assert resumed_at[0] % 5 == 0
    history = json.loads((trained.local_dir / "history.json").read_text())
    assert [record["step"] for record in history] == list(range(1, 61))
    assert not any(record["was_skipped"] for record in history)


def test_one_failure_too_many_ends_in_an_error_that_names_the_limit(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=r"gave up after train\.resources\.max_failures"):
        _train_while_killing(tmp_path, "train.resources.max_failures=0")
    assert not list(tmp_path.glob("tiny/train/*/manifest.json"))
