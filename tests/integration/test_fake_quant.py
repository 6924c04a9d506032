"""Training through rounding that begins in the middle, on a local Ray."""

import json
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.models import ModelConfig
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model


def _pipeline(root: Path, *overrides: str) -> Pipeline:
    source = f"base.source={write_tiny_model(root / 'model', max_positions=1024)}"
    settings = [f"run.root={root}", source, "train.precision=fp32", *overrides]
    return Pipeline(load_config("jobs/configs/tiny.yaml", settings))


def _losses(root: Path, *overrides: str) -> list[float]:
    trained = _pipeline(root, "train.resources.num_workers=1", *overrides).train()
    history = json.loads((trained.local_dir / "history.json").read_text())
    return [float(record["loss"]) for record in history]


@pytest.mark.usefixtures("local_ray")
def test_rounding_begins_after_its_share_of_the_steps(tmp_path: Path) -> None:
    plain = _losses(tmp_path, "train.fake_quant=null")
    late = _losses(tmp_path, "train.fake_quant_start_share=0.5")

    assert len(plain) == len(late) == 6
    assert late[:3] == pytest.approx(plain[:3], rel=1e-6)
    assert all(abs(one - other) > 1e-6 for one, other in zip(late[3:], plain[3:], strict=True))


@pytest.mark.usefixtures("local_ray")
def test_workers_train_through_rotated_rounding_with_a_compressed_exchange(tmp_path: Path) -> None:
    settings = [
        *("train.fake_quant=w8a8", "train.fake_quant_rotate=true", "compress.rotate=true"),
        *("train.exchange={type: delta4_async}", "train.num_steps=12", "train.warmup_steps=1"),
    ]
    pipeline = _pipeline(tmp_path, *settings)

    history = json.loads((pipeline.train().local_dir / "history.json").read_text())
    compressed = pipeline.compress()

    losses = [record["loss"] for record in history if record["loss"] is not None]
    assert len(losses) >= 6
    assert sum(losses[-3:]) < sum(losses[:3])
    assert compressed.manifest.metrics["max_fake_quant_difference"] < 1e-3
    assert not ModelConfig.load(compressed.local_dir).tie_embeddings
