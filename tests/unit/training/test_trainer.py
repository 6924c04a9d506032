"""What the driver does about damaged checkpoints."""

from pathlib import Path

import pytest

from r1ray.config.training import TrainConfig
from r1ray.exchange import LocalTransport
from r1ray.exchange.dense import DenseExchange
from r1ray.training.checkpoint import STATE_NAME, is_whole, save_checkpoint
from r1ray.training.step import TrainState
from r1ray.training.trainer import _salvage_checkpoint
from tests.fakes import tiny_model
from tests.unit.training.batches import random_batch


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, the newer one cut off, and the index of Ray Train that names the older."""
    config = TrainConfig(num_steps=4, warmup_steps=1, precision="fp32")
    state = TrainState(tiny_model(), config, DenseExchange(), LocalTransport())
    history = [state.run_step([random_batch(2, 8, seed=0)], flush=True)]
    for name in ("checkpoint_1", "checkpoint_2"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name, state, history, rank=0, world_size=1)
    (tmp_path / "checkpoint_2" / STATE_NAME).write_bytes(b"PK")
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    return tmp_path


def test_a_readable_index_is_left_alone(root: Path) -> None:
    assert _salvage_checkpoint(root) is None
    assert (root / "checkpoint_manager_snapshot.json").exists()


def test_where_the_index_is_damaged_the_newest_whole_checkpoint_is_found(root: Path) -> None:
    (root / "checkpoint_manager_snapshot.json").write_text('{"checkpo')
    for _ in range(2):  # the index is gone the second time
        assert _salvage_checkpoint(root) == root / "checkpoint_1"
        assert not (root / "checkpoint_manager_snapshot.json").exists()


def test_without_a_whole_checkpoint_training_starts_anew(root: Path) -> None:
    (root / "checkpoint_manager_snapshot.json").write_text("")
    (root / "checkpoint_1" / "model.safetensors").write_bytes(b"")
    assert not is_whole(root / "checkpoint_1")
    assert _salvage_checkpoint(root) is None
    assert _salvage_checkpoint(root / "missing") is None
