"""Codebooks against the best uniform 4 bits, and top-k logits with and without their tail."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.benchmarks.compression_measure import task_perplexity
from jobs.benchmarks.uniform4 import best_uniform
from r1ray.compression.codebook import fit_rows, measure_fisher
from r1ray.compression.distillation import dense_kl, sparse_kl, target_logits, top_k_kl
from r1ray.compression.logit_store import (
    INDEX_NAME,
    PART_BATCHES,
    LogitIndex,
    LogitStore,
    encode_part,
    part_name,
)
from r1ray.config import PipelineConfig
from r1ray.data.batch_set import BatchSet, MicroBatch, shuffled
from r1ray.data.texts import read_english
from r1ray.evaluation.perplexity import measure_perplexity
from r1ray.models import Decoder, load_model
from r1ray.models.quantization import list_linears
from r1ray.models.tokenizer import Tokenizer
from r1ray.ops.codebook import encode_rows

__all__ = ["TOP_KS", "measure_tails", "measure_uniform"]

TOP_KS = (8, 32, 128)
_ENGLISH_TOKENS, _WINDOW = 16_384, 1024
_SCALE_BITS = 32  # of a row


def measure_uniform(
    model_dir: Path, batches_dir: Path, config: PipelineConfig, heldout: list[MicroBatch]
) -> dict[str, Any]:
    """Perplexities with 4-bit weights of each kind, activations in float, and bits a weight.

    The uniform kinds have the codebooks' outliers, and at least their bits.
    """
    model, tokenizer = load_model(model_dir, dtype=torch.float32), Tokenizer(model_dir)
    batches = BatchSet(batches_dir)
    chosen = shuffled(range(len(batches)), "calibration")[: config.compress.calibration_batches]
    fisher = measure_fisher(model, (batches.read(index) for index in chosen))
    share = config.compress.outlier_share
    decoded: dict[str, list[Tensor]] = {"float": [], "codebook": []}
    bits: dict[str, float] = {}
    linears = [linear for _, _, linear in list_linears(model)]
    numel = sum(linear.weight.numel() for linear in linears)
    for linear in linears:
        weight = linear.weight.detach().clone()
        q_OI, scale_O = fit_rows(weight, fisher[linear], outlier_share=share)
        coded = encode_rows(q_OI)
        outlier_bits = 8 * sum(
            item.numel() * item.element_size()
            for item in (coded.outlier_columns_N, coded.outlier_values_N, coded.num_outliers_O)
        )
        row_bits = 8 * coded.codebook_OC.shape[1] + _SCALE_BITS
        found = best_uniform(weight, _outliers(q_OI, coded), row_bits / weight.shape[1])
        decoded["float"].append(weight)
        decoded["codebook"].append(q_OI * scale_O[:, None])
        parts = {"codebook": 8 * coded.num_bytes + _SCALE_BITS * len(q_OI)}
        for kind, (values, weight_bits) in found.items():
            decoded.setdefault(kind, []).append(values)
            parts[kind] = round(weight_bits * weight.numel()) + outlier_bits
        for kind, total in parts.items():
            bits[kind] = bits.get(kind, 0.0) + total / numel
    results = {
        kind: _perplexities(model, linears, weights, tokenizer, heldout)
        for kind, weights in decoded.items()
    }
    return {"bits": bits, "perplexity": results}


def _outliers(q_OI: Tensor, coded: Any) -> Tensor:
    """Where `q_OI` has a value that is not in its row's codebook."""
    is_coded = torch.zeros_like(q_OI, dtype=torch.bool)
    for column in coded.codebook_OC.T:
        is_coded |= q_OI == column[:, None]
    return ~is_coded


@torch.no_grad()
def _perplexities(
    model: Decoder,
    linears: Sequence[nn.Linear],
    weights: Sequence[Tensor],
    tokenizer: Tokenizer,
    heldout: list[MicroBatch],
) -> dict[str, float]:
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.copy_(weight)
    english = measure_perplexity(
        model, tokenizer, read_english(), max_tokens=_ENGLISH_TOKENS, window=_WINDOW
    )
    return {"task": task_perplexity(model, heldout), "english": english}


@torch.inference_mode()
def measure_tails(
    teacher_dir: Path, student_dir: Path, heldout: list[MicroBatch]
) -> dict[str, Any]:
    """By k: relative error of KL(teacher ‖ student) with tail and without, and bytes a target.

    Errors are those of single targets, averaged, over the mean dense divergence.
    """
    teacher, student = load_model(teacher_dir), load_model(student_dir)
    results = {}
    with tempfile.TemporaryDirectory(prefix="r1ray-tails-") as directory:
        for top_k in TOP_KS:
            store = _store(Path(directory), teacher, heldout, top_k)
            dense_sum, with_tail, without, count = 0.0, 0.0, 0.0, 0
            for index, batch in enumerate(heldout):
                theirs, mine = target_logits(teacher, batch), target_logits(student, batch)
                targets = store.read(index)
                dense = dense_kl(mine, theirs, 1.0)
                with_tail += float((sparse_kl(mine, targets, 1.0) - dense).abs().sum())
                without += float((top_k_kl(mine, targets, 1.0) - dense).abs().sum())
                dense_sum += float(dense.sum())
                count += len(dense)
            results[str(top_k)] = {
                "dense_kl": dense_sum / count,
                "tail_error": with_tail / dense_sum,
                "top_k_error": without / dense_sum,
                "bytes_per_target": store.index.bytes_per_target,
            }
    return {"by_k": results}


def _store(directory: Path, teacher: Decoder, batches: list[MicroBatch], top_k: int) -> LogitStore:
    size = 0
    for part, start in enumerate(range(0, len(batches), PART_BATCHES)):
        data = encode_part(
            teacher, batches[start : start + PART_BATCHES], top_k=top_k, temperature=1.0
        )
        (directory / part_name(part)).write_bytes(data)
        size += len(data)
    num_targets = sum(batch.num_targets for batch in batches)
    index = LogitIndex(
        top_k=top_k,
        temperature=1.0,
        vocab_size=teacher.config.vocab_size,
        num_batches=len(batches),
        num_targets=num_targets,
        bytes_per_target=size / num_targets,
    )
    (directory / INDEX_NAME).write_text(json.dumps(asdict(index)), encoding="utf-8")
    return LogitStore(directory)
