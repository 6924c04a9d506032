"""The INT8 export of a trained model directory."""

import json
from pathlib import Path

import pytest
import torch

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.compression.export import export_int8, weight_bytes
from r1ray.config.schema import CompressConfig
from r1ray.models import load_model
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model


@pytest.fixture
def trained(tmp_path: Path) -> Artifact:
    def body(out_dir: Path) -> dict[str, int]:
        write_tiny_model(out_dir)
        return {}

    return ArtifactStore(str(tmp_path)).run("train", {}, {}, body)


def test_export_is_small_close_and_says_where_it_comes_from(
    trained: Artifact, tmp_path: Path
) -> None:
    out_dir = tmp_path / "int8"
    metrics = export_int8(CompressConfig(), trained, out_dir)
    # 29,000 parameters: scales and norms weigh more than in a real model, which comes to 0.25.
    assert metrics["size_share"] == weight_bytes(out_dir) / weight_bytes(trained.local_dir) < 0.4
    exported, original = load_model(out_dir), load_model(trained.local_dir)
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        error = (exported(ids) - original(ids)).norm() / original(ids).norm()
    assert float(error) == pytest.approx(metrics["relative_logit_error"], rel=1e-3)
    assert 0 < error < 0.05
    record = json.loads((out_dir / "r1ray.json").read_text())
    assert record["provenance"]["trained_digest"] == trained.digest
    assert Tokenizer(out_dir).encode("the fox") == Tokenizer(trained.local_dir).encode("the fox")
