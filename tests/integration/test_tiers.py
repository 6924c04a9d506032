"""Training from files, on a local Ray."""

import json
import logging
from pathlib import Path

import pytest
import torch

from r1ray.config import load_config
from r1ray.errors import BudgetError
from r1ray.models import load_model
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model

pytestmark = pytest.mark.usefixtures("local_ray")


def test_two_workers_train_from_files_as_they_do_from_memory(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", max_positions=1024)
    losses, weights = {}, {}
    for arm, overrides in {
        "memory": [],
        "files": ["train.resources.tiers={budget_mib: 2048}"],
    }.items():
        config = load_config(
            "jobs/configs/tiny.yaml",
            [
                f"run.root={tmp_path / arm}",
                f"base.source={tmp_path / 'model'}",
                "train.precision=fp32",
                "train.resources.checkpoint_every_steps=3",
                *overrides,
            ],
        )
        trained = Pipeline(config).train()
        history = json.loads((trained.local_dir / "history.json").read_text())
        losses[arm] = [record["loss"] for record in history]
        weights[arm] = load_model(trained.local_dir).state_dict()
    assert losses["files"] == pytest.approx(losses["memory"], rel=1e-3)
    for name, tensor in weights["memory"].items():
        torch.testing.assert_close(weights["files"][name], tensor, rtol=0, atol=1e-4, msg=name)


def test_a_budget_that_is_spent_ends_training_without_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    write_tiny_model(tmp_path / "model", max_positions=1024)
    overrides = [
        f"run.root={tmp_path}",
        f"base.source={tmp_path / 'model'}",
        "train.precision=fp32",
        "train.resources.tiers={budget_mib: 1}",
    ]
    with pytest.raises(BudgetError, match="above the budget of 1 MiB; raise"):
        Pipeline(load_config("jobs/configs/tiny.yaml", overrides)).train()
    assert "restart" not in caplog.text
