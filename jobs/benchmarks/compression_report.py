"""The rows of docs/benchmarks/compression.json, with their bars, and the page beside it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.compression_codebook import TOP_KS
from jobs.benchmarks.compression_models import NUM_PROBLEMS, SEEDS
from r1ray.evaluation.accuracy import paired_difference, proportion
from r1ray.evaluation.record import Row, render_table

__all__ = ["build_rows", "write_report"]

Results = Mapping[str, Mapping[str, Any]]
_QUANTIZED = ("bf16", "int8_ptq", "int8_qat", "w4a8_ptq", "w4a8_qat", "codebook4")
_EASY_NATS = 0.02  # less than that lost by rounding says nothing about what QAT recovers


def build_rows(results: Results) -> list[Row]:
    """Every row of the record, from the stored results by name."""
    return [
        *_quantization_rows(results),
        *_codebook_rows(results["uniform"]),
        *_distillation_rows(results),
        *_tail_rows(results["tails"]),
        *(row for task in ("train", "serve") for row in _layer_rows(task, results)),
        *_export_rows(results["exports"]),
    ]


def _quantization_rows(results: Results) -> list[Row]:
    arms = {name: results[f"quantization_{name}"] for name in ("fp32", *_QUANTIZED)}
    plain = arms["fp32"]
    rows = []
    for name in _QUANTIZED:
        drop, low, high = paired_difference(plain["is_correct"], arms[name]["is_correct"])
        bar = "<= 0.01" if name == "int8_qat" else None
        rows.append(
            Row(
                f"compression.{name}_accuracy_drop",
                drop,
                "points/100",
                (low, high),
                "fp32, accuracy",
                statistics.mean(plain["is_correct"]),
                bar,
            )
        )
        rows += _perplexity_rows(name, arms[name], plain)
        rows += _cost_rows(name, arms[name], plain)
    return [*rows, *_recovery_rows(arms)]


def _perplexity_rows(name: str, arm: Mapping[str, Any], plain: Mapping[str, Any]) -> list[Row]:
    """The worse of both texts, then each."""
    ratios = {
        text: arm[f"{text}_perplexity"] / plain[f"{text}_perplexity"]
        for text in ("task", "english")
    }

    def row(text: str, suffix: str, bar: str | None) -> Row:
        return Row(
            f"compression.{name}_perplexity_ratio{suffix}",
            ratios[text],
            f"x ({text})",
            baseline=f"fp32, {text}",
            baseline_value=plain[f"{text}_perplexity"],
            bar=bar,
        )

    worse = max(ratios, key=ratios.__getitem__)
    return [
        row(worse, "", "<= 1.01" if name == "int8_qat" else None),
        *(row(text, f".{text}", None) for text in ratios),
    ]


def _cost_rows(name: str, arm: Mapping[str, Any], plain: Mapping[str, Any]) -> list[Row]:
    def share(row_id: str, mine: float, theirs: float, unit: str, bar: str | None = None) -> Row:
        return Row(row_id, mine / theirs, "share", None, f"fp32, {unit}", theirs, bar)

    rows = [
        share(
            f"compression.{name}_size_share",
            arm["weight_bytes"],
            plain["weight_bytes"],
            "bytes on disk",
        ),
        share(
            f"compression.{name}_decode_share",
            arm["latency"]["decode_ms_per_token"],
            plain["latency"]["decode_ms_per_token"],
            "ms a token",
        ),
    ]
    if arm["resident_bytes"] is not None:
        is_int8 = name == "int8_ptq"
        rows.append(
            share(
                "compression.int8_resident_share"
                if is_int8
                else f"compression.{name}_resident_share",
                arm["resident_bytes"],
                plain["resident_bytes"],
                "bytes resident",
                "<= 0.4" if is_int8 else None,
            )
        )
    return rows


def _recovery_rows(arms: Results) -> list[Row]:
    """Share of what rounding to 4 bits loses on the task that training through it brings back."""
    logs = {name: math.log(arm["task_perplexity"]) for name, arm in arms.items()}
    lost = logs["w4a8_ptq"] - logs["fp32"]
    can_tell = lost >= _EASY_NATS
    return [
        Row(
            "compression.w4a8_qat_recovery",
            (logs["w4a8_ptq"] - logs["w4a8_qat"]) / lost if can_tell else 0.0,
            "share" if can_tell else "share (not counted: too little is lost to tell)",
            baseline="lost by w4a8_ptq, nats",
            baseline_value=lost,
            bar=">= 0.667",
        )
    ]


def _codebook_rows(uniform: Mapping[str, Any]) -> list[Row]:
    rows = []
    perplexity, bits = uniform["perplexity"], uniform["bits"]
    for text, suffix, bar in (("task", "", "< 1"), ("english", "_english", None)):
        kinds = ("symmetric", "asymmetric")
        best = min(kinds, key=lambda kind: perplexity[kind][text])
        rows.append(
            Row(
                f"compression.codebook4_vs_uniform4_perplexity{suffix}",
                perplexity["codebook"][text] / perplexity[best][text],
                "x",
                baseline=f"{best} uniform, {bits[best]:.2f} bits a weight, {text}",
                baseline_value=perplexity[best][text],
                bar=bar,
            )
        )
        rows.append(
            Row(
                f"compression.codebook4_vs_float_perplexity{suffix}",
                perplexity["codebook"][text] / perplexity["float"][text],
                "x",
                baseline=f"float weights, {text}",
                baseline_value=perplexity["float"][text],
            )
        )
    rows += [
        Row(f"compression.bits_a_weight.{kind}", value, "bits") for kind, value in bits.items()
    ]
    return rows


def _distillation_rows(results: Results) -> list[Row]:
    teacher = statistics.mean(results["quantization_fp32"]["is_correct"])
    students = [results[f"student_{seed}"] for seed in SEEDS]
    rows = []
    for name in ("sft", "kd", "kd_int8"):
        kept = [
            statistics.mean(student["arms"][name]["is_correct"]) / teacher for student in students
        ]
        row_id = "compression.distilled_int8_accuracy_kept"
        rows.append(
            Row(
                row_id if name == "kd_int8" else f"compression.student_accuracy_kept.{name}",
                statistics.mean(kept),
                "of the teacher's",
                (min(kept), max(kept)),
                "teacher in fp32, accuracy",
                teacher,
                ">= 0.95" if name == "kd_int8" else None,
            )
        )
    return [*rows, *_latency_rows(results["latency"]["seconds"])]


def _latency_rows(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Time for the same answers, by answer: medians of ratios with a bootstrapped 95% interval."""
    pairs = {
        "compression.distilled_int8_latency_share": ("student_int8", "teacher_fp32", "<= 0.29"),
        "compression.latency_share.distilled": ("student_fp32", "teacher_fp32", None),
        "compression.latency_share.int8_of_student": ("student_int8", "student_fp32", None),
        "compression.latency_share.int8_of_teacher": ("teacher_int8", "teacher_fp32", None),
    }
    rows = []
    for row_id, (mine, base, bar) in pairs.items():
        ratios = np.asarray(seconds[mine]) / np.asarray(seconds[base])
        picks = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
        low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
        rows.append(
            Row(
                row_id,
                float(np.median(ratios)),
                "share",
                (float(low), float(high)),
                f"{base}, s an answer",
                statistics.median(seconds[base]),
                bar,
            )
        )
    return rows


def _tail_rows(tails: Mapping[str, Any]) -> list[Row]:
    by_k = tails["by_k"]
    worst = max(TOP_KS, key=lambda k: by_k[str(k)]["tail_error"] / by_k[str(k)]["top_k_error"])

    def row(row_id: str, k: int, bar: str | None) -> Row:
        item = by_k[str(k)]
        return Row(
            row_id,
            item["tail_error"] / item["top_k_error"],
            f"x (k = {k})",
            baseline="top-k alone, error of KL",
            baseline_value=item["top_k_error"],
            bar=bar,
        )

    return [
        row("compression.tail_kl_error_vs_topk", worst, "< 1"),
        *(row(f"compression.tail_kl_error_vs_topk.k{k}", k, None) for k in TOP_KS),
        *(
            Row(f"compression.tail_kl_error.k{k}", by_k[str(k)]["tail_error"], "of dense KL")
            for k in TOP_KS
        ),
        *(
            Row(f"compression.logit_bytes.k{k}", by_k[str(k)]["bytes_per_target"], "bytes a target")
            for k in TOP_KS
        ),
    ]


def _layer_rows(task: str, results: Results) -> list[Row]:
    found = results[f"layers_{task}"]
    slower = found["tiered"]["seconds"] / found["plain"]["seconds"]
    factor = found["tiered_parameters"] / found["plain_parameters"]
    name = {"train": "trainable", "serve": "servable"}[task]
    counts = slower <= 3
    return [
        Row(
            f"compression.layered_{name}_factor",
            factor if counts else 0.0,
            "x parameters"
            + (" or more" if found["is_capped"] else "")
            + ("" if counts else f" (not counted: {factor:.1f} at {slower:.1f}x the time)"),
            baseline=f"without tiers, {found['budget_mib']} MiB, parameters",
            baseline_value=found["plain_parameters"],
            bar=">= 3",
        ),
        Row(
            f"compression.layered_{name}_slowdown",
            slower,
            "x (warm page cache)",
            baseline=f"without tiers, {found['plain_layers']} layers, s",
            baseline_value=found["plain"]["seconds"],
        ),
        Row(
            f"compression.layered_{name}_slowdown_cold",
            found["tiered_cold"]["seconds"] / found["plain"]["seconds"],
            "x (cold page cache)",
        ),
        Row(
            f"compression.layered_{name}_peak_share",
            found["largest"]["grown_bytes"] / 2**20 / found["budget_mib"],
            "of the budget, at the largest size",
        ),
    ]


def _export_rows(exports: Mapping[str, Any]) -> list[Row]:
    return [
        Row(f"compression.export_equal_{kind}.{reader}", exports[reader][kind], "share")
        for reader in ("llama_cpp", "transformers")
        if reader in exports
        for kind in ("first_tokens", "tokens")
    ]


def write_report(
    record: Mapping[str, Any], rows: Sequence[Row], results: Results, target: Path
) -> str:
    """Write the page beside the record; returns its table of rows."""
    hardware = record["hardware"]
    table = render_table(rows)
    text = (
        f"# Compression\n\n`{record['command']}` on {hardware['cores']} cores of "
        f"{hardware['cpu']} ({', '.join(hardware['flags'])}; native kernels: "
        f"{hardware['native_kernels'] or 'none'}), {hardware['memory_gib']} GiB, commits "
        f"{', '.join(record['commits_of_parts'])}, {record['date']}.\n\n"
        f"{_render_arms(results)}\n{table}\n{_render_placements(results)}\n{_NOTES}"
    )
    (target / "compression.md").write_text(text, encoding="utf-8")
    return table


def _render_placements(results: Results) -> str:
    """Where the parts of the largest models were, and what their steps took."""
    lines = ["Placement under the budget; every step touches every part once:", ""]
    for task in ("train", "serve"):
        found = results[f"layers_{task}"]
        for size, layers in (("tiered", "plain_layers"), ("largest", "tiered_layers")):
            warm, cold = found[size], found[f"{size}_cold"]
            lines.append(
                f"- {task}, {found[layers]} layers: {warm['placement']}; "
                f"{warm['seconds']:.2f} s, with a cold page cache {cold['seconds']:.2f} s"
            )
    return "\n".join(lines) + "\n"


def _render_arms(results: Results) -> str:
    lines = [
        "| model | accuracy | task perplexity | English | MB on disk | MB resident | ms a token |",
        "|---|---|---|---|---|---|---|",
    ]
    models = {name: results[f"quantization_{name}"] for name in ("fp32", *_QUANTIZED)}
    for seed in SEEDS:
        arms = results[f"student_{seed}"]["arms"]
        models |= {f"student {name}, seed {seed}": arm for name, arm in arms.items()}
    for name, arm in models.items():
        share = proportion(arm["is_correct"])
        resident = arm["resident_bytes"]
        low, high = 100 * share.low, 100 * share.high
        lines.append(
            f"| {name} | {100 * share.value:.1f}% [{low:.1f}, {high:.1f}] | "
            f"{arm['task_perplexity']:.4f} | {arm['english_perplexity']:.2f} | "
            f"{arm['weight_bytes'] / 1e6:.0f} | "
            f"{'' if resident is None else f'{resident / 1e6:.0f}'} | "
            f"{arm['latency']['decode_ms_per_token']:.1f} |"
        )
    return "\n".join(lines) + "\n"


_NOTES = f"""
- {NUM_PROBLEMS} held-out problems, greedy; drops are paired, with a bootstrapped 95% interval.
  Every quantization arm trains 100 steps on the same batches from SmolLM2-135M-Instruct, which is
  itself rounded to 4 bits in groups of 32. bf16: weights and activations.
- Task perplexity: target tokens of the held-out problems' own traces. English: 16,384 tokens of
  Python's documentation.
- Resident: what loading and one forward of 16 tokens add at their peak to a process that has
  imported everything and run a small model (the kernel's VmHWM).
- Codebooks against uniform: float activations; scales, codebooks and outliers counted, the same
  outliers, and groups so small that uniform never has fewer bits. Uniform ranges are clipped to the
  least squared error of each group; symmetric and with an offset, the better one is the baseline.
- Students: 9 of the 30 layers (30% of the parameters outside of embeddings); taught ones for 400
  steps, the others for as many more as have the operations of the teacher's forward over all data.
  Intervals: seeds.
- Latency: the text of 40 answers of the teacher, decoded token by token by each model in turn.
- KL errors: |KL - dense KL| of single targets, over the mean dense KL, between the tuned teacher
  and the student without one; from logits as they are stored (16 bits).
- Layers: SmolLM2's widths, a vocabulary of 4,096, random weights; 4 x 64 tokens a step, AdamW in
  float32; or a prompt of 32 tokens and 8 more, float32 weights. Peaks are the kernel's VmHWM above
  the process's baseline; the page cache, up to 16 bytes a parameter, is not in them. Sizes are
  searched up to six times the untiered one. Times: medians of five after a warm-up, at the largest
  size that fits without tiers.
"""
