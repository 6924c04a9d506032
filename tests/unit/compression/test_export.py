"""The INT8 export of a trained model directory."""

import json
from pathlib import Path

import pytest
import torch

from r1ray.artifacts import Artifact, ArtifactStore
from r1ray.compression.export import export_model, weight_bytes
from r1ray.config.schema import CompressConfig, Scheme
from r1ray.data.batch_set import BatchSet
from r1ray.models import load_model
from r1ray.models.gguf import load_gguf_model
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import write_tiny_model
from tests.unit.training.batches import write_batch_set


@pytest.fixture
def trained(tmp_path: Path) -> Artifact:
    def body(out_dir: Path) -> dict[str, int]:
        write_tiny_model(out_dir)
        return {}

    return ArtifactStore(str(tmp_path)).run("train", {}, {}, body)


@pytest.fixture
def batches(tmp_path: Path) -> BatchSet:
    return write_batch_set(tmp_path / "batches")


def test_export_is_small_close_and_says_where_it_comes_from(
    trained: Artifact, batches: BatchSet, tmp_path: Path
) -> None:
    out_dir = tmp_path / "int8"
    metrics = export_model(CompressConfig(), trained, batches, out_dir)
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


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_what_is_served_is_what_was_trained_towards(
    scheme: Scheme, trained: Artifact, batches: BatchSet, tmp_path: Path
) -> None:
    metrics = export_model(CompressConfig(scheme=scheme), trained, batches, tmp_path / "out")
    # Logits of up to 10; sums of products are rounded in float32 there, exact here.
    assert metrics["max_fake_quant_difference"] < 1e-4
    assert metrics["scheme"] == scheme
    assert load_model(tmp_path / "out").scheme == scheme


def test_four_bits_are_smaller_and_further_from_the_float_model(
    trained: Artifact, batches: BatchSet, tmp_path: Path
) -> None:
    eight = export_model(CompressConfig(), trained, batches, tmp_path / "eight")
    four = export_model(CompressConfig(scheme="w4a8"), trained, batches, tmp_path / "four")
    assert four["served_bytes"] < eight["served_bytes"]
    assert four["relative_logit_error"] > 2 * eight["relative_logit_error"]


def test_codebooks_are_fitted_to_the_data_and_lie_closer_than_uniform_four_bits(
    trained: Artifact, batches: BatchSet, tmp_path: Path
) -> None:
    config = CompressConfig(scheme="codebook4", calibration_batches=100)
    metrics = export_model(config, trained, batches, tmp_path / "out")
    uniform = export_model(CompressConfig(scheme="w4a8"), trained, batches, tmp_path / "four")
    assert metrics["relative_logit_error"] < 0.75 * uniform["relative_logit_error"]
    assert "max_fake_quant_difference" not in metrics
    assert load_model(tmp_path / "out").scheme == "codebook4"


def test_copies_for_other_programs_lie_beside_the_served_model(
    trained: Artifact, batches: BatchSet, tmp_path: Path
) -> None:
    config = CompressConfig(exports=["gguf", "compressed_tensors"])
    metrics = export_model(config, trained, batches, tmp_path)
    exports = tmp_path / "exports"
    assert load_gguf_model(exports / "gguf" / "model-q8_0.gguf").config.num_layers == 2
    record = json.loads((exports / "compressed_tensors" / "config.json").read_text())
    assert record["quantization_config"]["format"] == "int-quantized"
    assert metrics["served_bytes"] == weight_bytes(tmp_path)  # the served model alone
