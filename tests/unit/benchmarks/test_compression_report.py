import math
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.compression_models import COSTS_AS
from jobs.benchmarks.compression_report import write_report
from jobs.benchmarks.compression_rows import QUANTIZED, build_rows
from r1ray.evaluation.record import Row

IDS = {
    "compression.int8_qat_accuracy_drop": "<= 0.01",
    "compression.int8_qat_perplexity_ratio": "<= 1.01",
    "compression.w4a8_qat_recovery": ">= 0.667",
    "compression.codebook4_vs_uniform4_perplexity": "< 1",
    "compression.int8_resident_share": "<= 0.4",
    "compression.distilled_int8_accuracy_kept": ">= 0.95",
    "compression.distilled_int8_latency_share": "<= 0.29",
    "compression.tail_kl_error_vs_topk": "< 1",
    "compression.layered_trainable_factor": ">= 3",
    "compression.layered_servable_factor": ">= 3",
}


def _arm(correct: int, task: float) -> dict[str, Any]:
    return {
        "is_correct": [index < correct for index in range(100)],
        "task_perplexity": task,
        "english_perplexity": 20.0,
        "weight_bytes": 1000,
    }


def _costs(resident: int | None = 100) -> dict[str, Any]:
    return {
        "decode_ms": [9.0, 10.0, 12.0],
        "plain_decode_ms": [18.0, 20.0, 20.0],
        "resident_bytes": resident,
    }


def _layers(seconds: float) -> dict[str, Any]:
    outcome = {"grown_bytes": 400 << 20, "seconds": seconds, "placement": "", "error": None}
    return {
        "budget_mib": 512,
        "is_capped": False,
        "plain_layers": 5,
        "plain_parameters": 10,
        "tiered_layers": 40,
        "tiered_parameters": 60,
        "plain": {**outcome, "seconds": 1.0},
        "tiered": outcome,
        "tiered_cold": outcome,
        "largest": outcome,
        "largest_cold": outcome,
    }


def _results(**changes: Any) -> dict[str, Any]:
    student = {"kd": _arm(77, 1.3), "kd_int8": _arm(76, 1.3)}
    by_k = {
        str(k): {"dense_kl": 0.1, "tail_error": 0.01, "top_k_error": 0.1, "bytes_per_target": 4 * k}
        for k in (8, 32, 128)
    }
    return {
        "quantization_fp32": _arm(80, 1.20),
        "quantization_bf16": _arm(80, 1.20),
        "quantization_int8_ptq": _arm(79, 1.21),
        "quantization_int8_ptq_rotated": _arm(79, 1.205),
        "quantization_int8_qat": _arm(80, 1.205),
        "quantization_int8_qat_unrotated": _arm(80, 1.205),
        "quantization_w4a8_ptq": _arm(50, 1.50),
        "quantization_w4a8_ptq_rotated": _arm(60, 1.40),
        "quantization_w4a8_qat": _arm(75, 1.25),
        "quantization_codebook4": _arm(78, 1.22),
        **{f"costs_{name}": _costs() for name in ("fp32", *QUANTIZED) if name not in COSTS_AS},
        "costs_bf16": _costs(resident=None),
        "costs_int8_ptq": _costs(resident=30),
        "uniform": {
            "bits": {"codebook": 4.3, "symmetric": 4.3, "asymmetric": 4.4},
            "perplexity": {
                "float": {"task": 1.2, "english": 20.0},
                "codebook": {"task": 1.21, "english": 21.0},
                "symmetric": {"task": 1.26, "english": 22.0},
                "asymmetric": {"task": 1.24, "english": 23.0},
            },
        },
        "teacher": {
            "arms": {"teacher": _arm(80, 1.20)},
            "tokens": 1000,
            "circumstances": {"hardware": {"gpu": None}},
        },
        **{f"student_{seed}": {"arms": student, "tokens": 5000} for seed in (0, 1, 2)},
        "untaught_0": {"arms": {"sft": _arm(60, 1.5)}, "tokens": 6000},
        "latency": {
            "seconds": {
                "teacher_fp32": [1.0, 1.2, 0.8],
                "teacher_int8": [0.5, 0.6, 0.4],
                "student_fp32": [0.4, 0.4, 0.4],
                "student_int8": [0.2, 0.24, 0.16],
            }
        },
        "tails": {"by_k": by_k},
        "layers_train": _layers(2.0),
        "layers_serve": _layers(2.0),
        "exports": {"llama_cpp": {"first_tokens": 1.0, "tokens": 0.9, "answers": 0.5}, "sizes": {}},
        **changes,
    }


def _rows(**changes: Any) -> dict[str, Row]:
    return {row.id: row for row in build_rows(_results(**changes))}


def test_every_bar_of_the_issue_has_a_row_of_that_name() -> None:
    rows = _rows()
    assert {name: rows[name].bar for name in IDS} == IDS
    assert {row.id for row in rows.values() if row.bar is not None} == set(IDS)
    assert len(rows) == len(build_rows(_results()))  # no name twice


def test_accuracy_and_perplexity_are_compared_over_the_seeds_that_both_arms_have() -> None:
    changes = {
        "quantization_fp32.seed_1": _arm(84, 1.2),
        "quantization_int8_qat.seed_1": _arm(80, 1.25),
        "quantization_fp32.seed_2": _arm(10, 1.2),  # its other arm was not measured
    }
    rows = _rows(**changes)
    row = rows["compression.int8_qat_accuracy_drop"]
    assert row.value == pytest.approx(0.02)  # none of 0.80, 4 points of 0.84
    assert row.baseline == "fp32, accuracy"
    assert row.baseline_value == pytest.approx(0.82)
    assert "2" in row.unit
    ratio = rows["compression.int8_qat_perplexity_ratio"]
    assert ratio.value == pytest.approx(math.sqrt(1.205 / 1.2 * 1.25 / 1.2))
    assert ratio.interval == pytest.approx((1.205 / 1.2, 1.25 / 1.2))


def test_recovery_is_the_share_of_the_lost_nats() -> None:
    row = _rows()["compression.w4a8_qat_recovery"]
    lost = math.log(1.50) - math.log(1.20)
    assert row.baseline_value == pytest.approx(lost)
    assert row.value == pytest.approx((math.log(1.50) - math.log(1.25)) / lost)
    assert row.met
    for perplexity in (1.21, 1.20, 1.19):  # little lost, nothing, less than nothing
        changed = {"quantization_w4a8_ptq": _arm(79, perplexity)}
        little = _rows(**changed)["compression.w4a8_qat_recovery"]
        assert not little.met
        assert "not counted" in little.unit


def test_the_better_uniform_kind_is_the_baseline() -> None:
    row = _rows()["compression.codebook4_vs_uniform4_perplexity"]
    assert row.value == pytest.approx(1.21 / 1.24)
    assert row.baseline == "asymmetric uniform, 4.40 bits a weight, task"


def test_the_perplexity_bar_is_on_the_worse_text() -> None:
    arm = _arm(80, 1.205) | {"english_perplexity": 20.6}
    row = _rows(quantization_int8_qat=arm)["compression.int8_qat_perplexity_ratio"]
    assert row.value == pytest.approx(1.03)
    assert row.unit == "x (english, seeds: 1)"
    assert not row.met


def test_drops_latencies_and_kept_accuracy_are_against_fp32() -> None:
    rows = _rows()
    assert rows["compression.int8_ptq_accuracy_drop"].value == pytest.approx(0.01)
    assert rows["compression.int8_resident_share"].value == pytest.approx(0.3)
    decode = rows["compression.int8_ptq_decode_share"]
    assert (decode.value, decode.interval) == (0.5, (0.5, pytest.approx(0.6)))
    assert rows["compression.distilled_int8_latency_share"].value == pytest.approx(0.2)
    assert rows["compression.latency_share.distilled"].value == pytest.approx(0.4)
    assert rows["compression.distilled_int8_accuracy_kept"].value == pytest.approx(0.95)


def test_students_are_averaged_over_the_seeds_that_were_measured() -> None:
    rows = _rows(
        student_1={"arms": {"kd": _arm(70, 1.3), "kd_int8": _arm(68, 1.3)}, "tokens": 5000}
    )
    row = rows["compression.distilled_int8_accuracy_kept"]
    assert row.value == pytest.approx((76 + 68 + 76) / 3 / 80)
    assert row.interval == pytest.approx((68 / 80, 76 / 80))
    assert not row.met
    untaught = rows["compression.student_accuracy_kept.sft"]
    assert untaught.value == pytest.approx(60 / 80)
    assert "1 of 3" in untaught.unit
    left = _results()
    del left["untaught_0"]
    missing = {row.id: row for row in build_rows(left)}["compression.student_accuracy_kept.sft"]
    assert missing.value is None


def test_a_factor_bought_with_more_than_three_times_the_time_does_not_count() -> None:
    rows = _rows(layers_train=_layers(3.5))
    row = rows["compression.layered_trainable_factor"]
    assert row.value == 0.0
    assert not row.met
    assert "not counted: 6.0 at 3.5x the time" in row.unit
    assert rows["compression.layered_servable_factor"].value == 6.0


def test_the_page_names_models_kernels_and_commits(tmp_path: Path) -> None:
    results = _results()
    record = {
        "command": "python -m jobs.bench_compression",
        "date": "2026-11-26",
        "commits_of_parts": {"teacher": "abc"},
        "hardware": {
            "cpu": "x",
            "cores": 2,
            "flags": ["avx2"],
            "memory_gib": 24,
            "native_kernels": None,
        },
    }
    write_report(record, build_rows(results), results, tmp_path)
    text = (tmp_path / "compression.md").read_text()
    assert "native kernels: none" in text
    assert "| int8_qat | 80.0% [" in text
    assert "| kd_int8 | 5,000 | 76.0%" in text
