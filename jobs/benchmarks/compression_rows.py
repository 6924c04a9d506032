"""The rows of docs/benchmarks/compression.json, with their bars."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jobs.benchmarks.compression_codebook import TOP_KS
from jobs.benchmarks.compression_models import COSTS_AS
from jobs.benchmarks.compression_students import SEEDS
from r1ray.evaluation.accuracy import paired_difference
from r1ray.evaluation.record import Row

__all__ = [
    "NEEDS_GPU",
    "OPTIONAL",
    "QUANTIZED",
    "Results",
    "build_rows",
    "list_students",
    "quantization_arms",
]

Results = Mapping[str, Mapping[str, Any]]
NEEDS_GPU = ("student_1", "student_2", "untaught_")  # hours each without
_BY_SEED = ("fp32", "int8_qat", "int8_qat_unrotated")
OPTIONAL = (*NEEDS_GPU, *(f"quantization_{name}." for name in _BY_SEED))  # as far as measured
_STUDENTS = ("untaught", "student")
QUANTIZED = (
    *("bf16", "int8_ptq", "int8_ptq_rotated", "int8_qat", "int8_qat_unrotated"),
    *("w4a8_ptq", "w4a8_ptq_rotated", "w4a8_qat", "codebook4"),
)
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
    arms = quantization_arms(results)
    plain = arms["fp32"]
    rows = []
    for name in QUANTIZED:
        rows.append(_drop_row(name, results))
        rows += _perplexity_rows(name, results)
        rows += _cost_rows(name, arms[name], plain)
        rows += _agreement_rows(name, arms[name])
    return [*rows, *_recovery_rows(arms)]


def _pair_seeds(name: str, results: Results) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(fp32, this arm) of all seeds that were measured of both."""
    floats, others = (
        {
            part.removeprefix(f"quantization_{arm}"): found
            for part, found in results.items()
            if part == f"quantization_{arm}" or part.startswith(f"quantization_{arm}.")
        }
        for arm in ("fp32", name)
    )
    return [(floats[seed], others[seed]) for seed in sorted(floats.keys() & others.keys())]


def _drop_row(name: str, results: Results) -> Row:
    """Over all seeds that were measured of both arms."""
    pairs = _pair_seeds(name, results)
    plain, other = ([item for pair in pairs for item in pair[at]["is_correct"]] for at in (0, 1))
    drop, low, high = paired_difference(plain, other)
    return Row(
        f"compression.{name}_accuracy_drop",
        drop,
        f"points/100 (seeds: {len(pairs)})",
        (low, high),
        "fp32, accuracy",
        statistics.mean(plain),
        "<= 0.01" if name == "int8_qat" else None,
    )


def _perplexity_rows(name: str, results: Results) -> list[Row]:
    """The worse of both texts, then each: geometric means and ranges over the seeds."""
    pairs = _pair_seeds(name, results)

    def against(text: str) -> Row:
        key = f"{text}_perplexity"
        ratios = [other[key] / plain[key] for plain, other in pairs]
        return Row(
            f"compression.{name}_perplexity_ratio.{text}",
            statistics.geometric_mean(ratios),
            f"x ({text}, seeds: {len(pairs)})",
            (min(ratios), max(ratios)) if len(pairs) > 1 else None,
            f"fp32, {text}",
            statistics.geometric_mean(plain[key] for plain, _ in pairs),
        )

    rows = [against("task"), against("english")]
    bar = "<= 1.01" if name == "int8_qat" else None
    worse = max(rows, key=_value)
    return [replace(worse, id=f"compression.{name}_perplexity_ratio", bar=bar), *rows]


def _value(row: Row) -> float:
    assert row.value is not None
    return row.value


def _agreement_rows(name: str, arm: Mapping[str, Any]) -> list[Row]:
    """How far served logits are from those that training through the rounding saw."""
    difference = arm.get("max_fake_quant_difference")
    if difference is None:
        return []
    return [Row(f"compression.{name}_fake_quant_difference", difference, "of a logit, at most")]


def _cost_rows(name: str, arm: Mapping[str, Any], plain: Mapping[str, Any]) -> list[Row]:
    def share(row_id: str, mine: float, theirs: float, unit: str, bar: str | None = None) -> Row:
        return Row(row_id, mine / theirs, "share", None, f"fp32, {unit}", theirs, bar)

    rows = [
        share(
            f"compression.{name}_size_share",
            arm["weight_bytes"],
            plain["weight_bytes"],
            "bytes on disk",
        )
    ]
    if name in COSTS_AS:
        return rows
    rows.append(
        _ratio_row(
            f"compression.{name}_decode_share",
            arm["decode_ms"],
            arm["plain_decode_ms"],
            "fp32 in turns, ms a token",
        )
    )
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
    teacher = max(
        statistics.mean(arm["is_correct"])
        for arm in (results["teacher"]["arms"]["teacher"], results["quantization_fp32"])
    )
    rows = []
    for name in ("sft", "kd", "kd_int8"):
        kept = [
            statistics.mean(arm["is_correct"]) / teacher
            for found, arm, _ in list_students(results)
            if found == name
        ]
        row_id = "compression.distilled_int8_accuracy_kept"
        rows.append(
            Row(
                row_id if name == "kd_int8" else f"compression.student_accuracy_kept.{name}",
                statistics.mean(kept) if kept else None,
                f"of the teacher's ({len(kept)} of {len(SEEDS)} seeds)",
                (min(kept), max(kept)) if kept else None,
                "the better tuned model in fp32, accuracy",
                teacher,
                ">= 0.95" if name == "kd_int8" else None,
            )
        )
    return [*rows, *_latency_rows(results["latency"]["seconds"])]


def quantization_arms(results: Results) -> dict[str, Mapping[str, Any]]:
    """What was measured of each quantization arm."""
    return {
        name: {**results[f"quantization_{name}"], **results[f"costs_{COSTS_AS.get(name, name)}"]}
        for name in ("fp32", *QUANTIZED)
    }


def list_students(results: Results) -> Iterator[tuple[str, Mapping[str, Any], float]]:
    """(arm, what was measured, tokens trained on) of the teacher and every student there is."""
    for part in ("teacher", *(f"{kind}_{seed}" for seed in SEEDS for kind in _STUDENTS)):
        found = results.get(part, {"arms": {}})
        for name, arm in found["arms"].items():
            yield name, arm, found["tokens"]


def _latency_rows(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Time for the same answers, by answer."""
    pairs = {
        "compression.distilled_int8_latency_share": ("student_int8", "teacher_fp32", "<= 0.29"),
        "compression.latency_share.distilled": ("student_fp32", "teacher_fp32", None),
        "compression.latency_share.int8_of_student": ("student_int8", "student_fp32", None),
        "compression.latency_share.int8_of_teacher": ("teacher_int8", "teacher_fp32", None),
    }
    return [
        _ratio_row(row_id, seconds[mine], seconds[base], f"{base}, s an answer", bar)
        for row_id, (mine, base, bar) in pairs.items()
    ]


def _ratio_row(
    row_id: str,
    mine: Sequence[float],
    base: Sequence[float],
    baseline: str,
    bar: str | None = None,
) -> Row:
    """The median of the turns' ratios, with a bootstrapped 95% interval."""
    ratios = np.asarray(mine) / np.asarray(base)
    picks = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    interval = (float(low), float(high))
    median = float(np.median(ratios))
    return Row(row_id, median, "share", interval, baseline, statistics.median(base), bar)


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
    """A reader that was not installed was not measured."""
    return [
        Row(
            f"compression.export_equal_{kind}.{reader}",
            exports[reader][kind] if reader in exports else None,
            "share",
        )
        for reader in ("llama_cpp", "transformers")
        for kind in ("first_tokens", "tokens")
    ]
