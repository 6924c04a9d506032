"""The `compress` stage: from a float model directory to the served quantized one.

The schemes are those of `r1ray.models.quantization`; the basis may be that of
`r1ray.models.rotation`. Activations are quantized per token when the model runs, so only codebooks
need data to be fitted to. A model that trained through fake quantization is compared with what it
is served as: both should give the same logits.

Price: about 0.25 of the float32 bytes (w8a8).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r1ray.artifacts import Artifact
from r1ray.compression.codebook import measure_fisher, quantize_to_codebooks
from r1ray.compression.compressed_tensors import write_compressed_tensors
from r1ray.compression.gguf import write_gguf
from r1ray.config.schema import CompressConfig
from r1ray.data.batch_set import BatchSet, shuffled
from r1ray.models.answer_lengths import write_answer_lengths
from r1ray.models.checkpoint import copy_tokenizer, load_model, save_model
from r1ray.models.decoder import Decoder
from r1ray.models.fusion import RowImages
from r1ray.models.quantization import fake_quantize_modules, quantize_modules
from r1ray.models.rotation import rotate

__all__ = ["EXPORTS_DIR", "export_model", "weight_bytes"]

EXPORTS_DIR = "exports"


def export_model(
    config: CompressConfig, trained: Artifact, batches: BatchSet, out_dir: Path
) -> dict[str, Any]:
    """Write the quantized model directory into `out_dir`; returns sizes and agreement of logits.

    The copies that `config.exports` asks for go into `out_dir/exports`.

    Args:
        batches: what was trained on; the codebooks are fitted to some of it, and servers expect
            answers as long as its own.
    """
    model = load_model(trained.local_dir, dtype=torch.float32)
    agreement = _quantize(model, config, batches)
    provenance = {
        "trained_run_id": trained.manifest.run_id,
        "trained_digest": trained.digest,
        "source": trained.manifest.stage,
    }
    save_model(model, out_dir, provenance=provenance)
    copy_tokenizer(trained.local_dir, out_dir)
    write_answer_lengths(out_dir, batches.summary.get("answer_lengths", {}))
    for name in config.exports:
        target = out_dir / EXPORTS_DIR / name
        target.mkdir(parents=True)
        if name == "gguf":
            write_gguf(out_dir, target / "model-q8_0.gguf")
        else:
            write_compressed_tensors(out_dir, target)
    float_bytes, served_bytes = weight_bytes(trained.local_dir), weight_bytes(out_dir)
    return {
        "scheme": config.scheme,
        "float_bytes": float_bytes,
        "served_bytes": served_bytes,
        "size_share": served_bytes / float_bytes,
        **agreement,
    }


def _quantize(model: Decoder, config: CompressConfig, batches: BatchSet) -> dict[str, float]:
    """Quantize `model` in place; returns how far its logits are from what they were."""
    as_float = _probe(model)
    if config.rotate:
        rotate(model)
    if config.scheme == "codebook4":
        chosen = shuffled(range(len(batches)), "calibration")[: config.calibration_batches]
        fisher = measure_fisher(model, (batches.read(index) for index in chosen))
        quantize_to_codebooks(model, fisher, outlier_share=config.outlier_share)
        as_trained = None
    else:
        fake_quantize_modules(model, config.scheme)
        as_trained = _probe(model)
        quantize_modules(model, config.scheme)
    as_served = _probe(model)
    agreement = {"relative_logit_error": float((as_served - as_float).norm() / as_float.norm())}
    if as_trained is not None:
        agreement["max_fake_quant_difference"] = float((as_served - as_trained).abs().max())
    return agreement


@torch.inference_mode()
def _probe(model: Decoder) -> Tensor:
    """Logits [1, T, V] of a fixed text, behind a fixed image where the model sees them."""
    ids_1T, images = torch.arange(64)[None] % model.config.vocab_size, None
    if model.fusion is not None:
        config, generator = model.fusion.config, torch.Generator().manual_seed(0)
        shape = (1, 3, config.image_size, config.image_size)
        pixels = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        images = model.fusion.look(RowImages(pixels, rows=(0,), places=(0,)), 1)
        ids_1T = F.pad(ids_1T, (config.num_image_tokens, 0), value=-1)
    return model(ids_1T, images=images)


def weight_bytes(model_dir: Path) -> int:
    """Bytes of all safetensors files in `model_dir`."""
    return sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
