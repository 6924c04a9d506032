"""The `compress` stage: from a float model directory to the served INT8 one (W8A8).

Every linear layer's weight becomes int8 per output channel, the embedding int8 per row; a tied head
shares the embedding's integers. Norms and biases stay float32. Activations are quantized per token
when the model runs, so no calibration data is needed.

Price: about 0.25 of the float32 bytes.
"""

from pathlib import Path
from typing import Any

import torch

from r1ray.artifacts import Artifact
from r1ray.config.schema import CompressConfig
from r1ray.models.checkpoint import copy_tokenizer, load_model, quantize_modules, save_model

__all__ = ["export_int8", "weight_bytes"]


def export_int8(config: CompressConfig, trained: Artifact, out_dir: Path) -> dict[str, Any]:
    """Write the INT8 model directory into `out_dir`; returns sizes and the agreement of logits."""
    model = load_model(trained.local_dir, dtype=torch.float32)
    probe_1T = torch.arange(64)[None] % model.config.vocab_size
    with torch.inference_mode():
        expected = model(probe_1T)
        quantize_modules(model)
        relative = (model(probe_1T) - expected).norm() / expected.norm()
    provenance = {
        "trained_run_id": trained.manifest.run_id,
        "trained_digest": trained.digest,
        "source": trained.manifest.stage,
    }
    save_model(model, out_dir, provenance=provenance)
    copy_tokenizer(trained.local_dir, out_dir)
    float_bytes, int8_bytes = weight_bytes(trained.local_dir), weight_bytes(out_dir)
    return {
        "scheme": config.scheme,
        "float_bytes": float_bytes,
        "int8_bytes": int8_bytes,
        "size_share": int8_bytes / float_bytes,
        "relative_logit_error": float(relative),
    }


def weight_bytes(model_dir: Path) -> int:
    """Bytes of all safetensors files in `model_dir`."""
    return sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
