"""Faults of training, caused for real on a local Ray."""

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch

from jobs.benchmarks.faults import FaultReport, provoke, small_disk
from r1ray.config import PipelineConfig, load_config
from r1ray.errors import DivergenceError, ExchangeError
from r1ray.models.checkpoint import load_model, save_model
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_STEPS = 60
CHECKPOINT_EVERY = 5


def _configure(directory: Path, *overrides: str, root: Path | None = None) -> PipelineConfig:
    write_tiny_model(directory / "model", max_positions=1024)
    return load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={root or directory}",
            f"base.source={directory / 'model'}",
            f"train.num_steps={NUM_STEPS}",
            f"train.resources.checkpoint_every_steps={CHECKPOINT_EVERY}",
            *overrides,
        ],
    )


def _check_finished(report: FaultReport) -> None:
    history = json.loads((report.trained.local_dir / "history.json").read_text())
    assert [record["step"] for record in history] == list(range(1, NUM_STEPS + 1))
    assert not any(record["was_skipped"] for record in history)


def test_a_worker_killed_while_an_exchange_is_under_way_costs_the_steps_since_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    report = provoke(
        "worker_killed",
        _configure(tmp_path, "train.exchange={type: delta4_async, sync_share: 0}"),
    )
    _check_finished(report)
    messages = [record.getMessage() for record in caplog.records]
    resumed = [
        int(found[1]) for text in messages if (found := re.match(r"resuming .* (\d+)", text))
    ]
    assert len(resumed) == 1
    assert resumed[0] >= CHECKPOINT_EVERY
    assert resumed[0] % CHECKPOINT_EVERY == 0
    assert 0 < report.recovery_s < 60
    # A checkpoint counts once Ray Train's controller knows of it: the latest may not yet.
    assert report.lost_steps < 2 * CHECKPOINT_EVERY


def test_a_worker_stopped_for_20_seconds_is_waited_for(tmp_path: Path) -> None:
    report = provoke("worker_stopped_20s", _configure(tmp_path))
    _check_finished(report)
    metrics = report.trained.manifest.metrics
    assert metrics["recoveries"] == []
    assert 19 < metrics["longest_step_s"] < 30


def test_a_worker_at_half_speed_slows_training_and_nothing_else(tmp_path: Path) -> None:
    report = provoke("worker_half_speed", _configure(tmp_path))
    _check_finished(report)
    assert report.trained.manifest.metrics["recoveries"] == []


def test_a_full_disk_at_a_checkpoint_costs_the_steps_since_the_one_before(tmp_path: Path) -> None:
    try:
        disk = small_disk(tmp_path / "disk", 64 << 20)
        with disk as root:
            report = provoke("disk_full", _configure(tmp_path, root=root))
            _check_finished(report)
            assert len(report.trained.manifest.metrics["recoveries"]) >= 1
            assert report.lost_steps < 2 * CHECKPOINT_EVERY
    except PermissionError as error:
        pytest.skip(str(error))


def test_one_failure_too_many_names_the_limit_and_another_number_of_workers_takes_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    overrides = ("train.exchange={type: delta4}", "train.resources.max_failures=0")
    with pytest.raises(ExchangeError, match=r"gave up after train\.resources\.max_failures"):
        provoke("worker_killed", _configure(tmp_path, *overrides))
    assert not list(tmp_path.glob("tiny/train/*/manifest.json"))
    trained = Pipeline(_configure(tmp_path, *overrides, "train.resources.num_workers=1")).train()
    _check_finished(FaultReport("", 0, 0, trained))
    assert re.search(r"resuming after step [1-9]", caplog.text)


def test_gradients_that_are_never_finite_end_training_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="r1ray")
    config = _configure(tmp_path)
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    save_model(model, tmp_path / "model")
    pipeline = Pipeline(config)
    pipeline.prepare()
    with pytest.raises(DivergenceError, match="not finite in 3 steps in a row"):
        pipeline.train()
