"""Training through rounding that begins in the middle, on a local Ray."""

import json
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.pipeline import Pipeline
from tests.fakes import write_tiny_model


def _losses(root: Path, *overrides: str) -> list[float]:
    config = load_config(
        "jobs/configs/tiny.yaml",
        [
            f"run.root={root}",
            f"base.source={root / 'model'}",
            "train.resources.num_workers=1",
            "train.precision=fp32",
            *overrides,
        ],
    )
    history = json.loads((Pipeline(config).train().local_dir / "history.json").read_text())
    return [float(record["loss"]) for record in history]


@pytest.mark.usefixtures("local_ray")
def test_rounding_begins_after_its_share_of_the_steps(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", max_positions=1024)

    plain = _losses(tmp_path, "train.fake_quant=null")
    late = _losses(tmp_path, "train.fake_quant_start_share=0.5")

    assert len(plain) == len(late) == 6
    assert late[:3] == pytest.approx(plain[:3], rel=1e-6)
    assert all(abs(one - other) > 1e-6 for one, other in zip(late[3:], plain[3:], strict=True))
