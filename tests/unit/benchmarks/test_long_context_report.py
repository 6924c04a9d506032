"""What the long-context benchmark makes of what it measured."""

from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks.long_context_arms import list_measured
from jobs.benchmarks.long_context_report import (
    fidelity_rows,
    memory_rows,
    operator_rows,
    plot_operator,
    reading_rows,
    render_gates,
    render_passkeys,
    render_tasks,
    task_rows,
)
from jobs.benchmarks.parts import StoredParts
from r1ray.evaluation.record import Row

LENGTHS = (1024, 8192, 16_384, 65_536)


def _operator() -> dict[str, dict[int, dict[str, list[float]]]]:
    """Sparse time grows like n, dense like n²."""
    times = {
        length: {
            "sparse": [0.325 * length / 1e6] * 3,
            "marked": [1.325 * length / 1e6] * 3,
            "dense": [length**2 / 2e9] * 3,
        }
        for length in LENGTHS
    }
    return {"prefill": times, "decode": times}


def _by_id(rows: list[Row]) -> dict[str, Row]:
    return {row.id: row for row in rows}


def test_speeds_and_growth_of_the_operator(tmp_path: Path) -> None:
    rows = _by_id(operator_rows(_operator()))
    assert rows["long_context.prefill_op_speedup_8k"].value == pytest.approx(4.096)
    assert rows["long_context.prefill_op_speedup_8k"].met
    assert rows["long_context.prefill_op_speedup_1k"].met is None
    assert rows["long_context.decode_op_speedup_64k"].bar == ">= 20"
    exponent = rows["long_context.prefill_exponent"]
    assert (exponent.value, exponent.baseline_value) == (pytest.approx(1.0), pytest.approx(2.0))
    assert exponent.met
    plot_operator(_operator(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_memory_is_compared_with_the_eager_implementation() -> None:
    at_1024 = {"peak_bytes": {"sparse": 3, "dense": 2, "eager": 10}, "pairs_kept": 0.42}
    rows = _by_id(memory_rows(at_1024, {"1024": 3 << 20}))
    assert rows["long_context.attention_memory_share_1024"].value == 0.3
    assert rows["long_context.attention_memory_share_1024"].met
    assert rows["long_context.attention_memory.1024"].value == 3.0


def _peer(name: str, prefill_s: float, tokens_per_s: float) -> dict[str, Any]:
    figures = {"prefill_s": prefill_s, "decode_tokens_per_s": tokens_per_s}
    return {"name": name, "weights": "Q8_0", "lengths": {"8000": figures}}


def test_the_fastest_peer_counts_if_both_were_measured() -> None:
    lengths = (8000, 16_000, 32_000)
    arms = {
        "sparse": {"prefill_s": [5.0, 4.0, 6.0], "token_s": [0.01]},
        "dense": {"prefill_s": [20.0, 20.0, 20.0], "token_s": [0.1]},
    }
    reads = {"by_length": dict.fromkeys(lengths, arms), "reread": [10.0, 40.0]}
    peers = [_peer("llama_cpp", 50.0, 20.0), _peer("openvino", 10.0, 30.0)]
    rows = _by_id(reading_rows(reads, peers))
    assert rows["long_context.prefill_8k_vs_best_peer"].value == 2.0
    assert rows["long_context.decode_8k_vs_llamacpp"].value == pytest.approx(5.0)
    chunked = rows["long_context.chunked_16k_vs_dense"]
    assert (chunked.value, chunked.interval, chunked.met) == (4.0, (20 / 6, 5.0), True)
    assert rows["long_context.chunked_16k_vs_rereading"].value == 10.0
    alone = _by_id(reading_rows(reads, peers[:1]))
    assert "long_context.prefill_8k_vs_best_peer" not in alone


def test_the_worst_task_that_dense_attention_can_do_counts() -> None:
    found = {
        "scores": {
            ("niah_single_1", 4096): ([[1.0]] * 10, [[1.0]] * 10),
            ("niah_multikey_2", 4096): ([[1.0]] * 10, [[1.0]] * 9 + [[0.5]]),
            ("vt", 4096): ([[1.0, 0.8]] * 5, [[0.9, 0.86]] * 5),
            ("cwe", 4096): ([[0.4]] * 10, [[0.0]] * 10),
            ("fwe", 4096): ([[0.8]] * 10, [[0.8]] * 9 + [[0.0]]),
        },
        "agreement": 0.9,
    }
    rows = _by_id(task_rows({"int8": found}))
    drop = rows["long_context.worst_task_drop"]
    assert (drop.value, drop.baseline_value, drop.met) == (
        pytest.approx(0.08),
        pytest.approx(0.8),
        False,
    )
    assert drop.baseline == "dense, fwe at 4096"
    assert drop.interval is not None
    assert drop.interval[0] == 0.0 < 0.1 < drop.interval[1]
    assert rows["long_context.tasks_that_count"].value == 4
    table = render_tasks({"int8": found}, ["vt", "cwe"], [4096])
    assert "| vt | 4096 | 10 | 5 | 0.900 | 0.880 | 0.020 [0.020, 0.020] |" in table


@pytest.mark.parametrize("dense", [0.6, 0.1])
def test_too_few_tasks_say_nothing(dense: float) -> None:
    scores = {("vt", length): ([[dense]] * 4, [[dense]] * 4) for length in (4096, 8192)}
    rows = _by_id(task_rows({"int8": {"scores": scores, "agreement": 0.9}}))
    drop = rows["long_context.worst_task_drop"]
    assert (drop.value, drop.met) == (None, None)
    assert "of 4 tasks" in drop.unit


def test_the_worse_length_counts_and_needles_of_all_kinds() -> None:
    found = {
        "perplexity": {4096: (20.0, 20.2), 8192: (18.0, 18.9)},
        "passkeys": {8192: ([1.0, 0.5], [1.0, 0.0])},
        "recall": {
            "niah_single_1": {"found": 8, "looks": 10, "mass": [0.9, 0.8]},
            "niah_multikey_2": {"found": 90, "looks": 90, "mass": [0.9, 0.7]},
            "documents": {"found": 0, "looks": 0, "mass": [0.9, 0.6]},
        },
        "agreement": {8192: 0.9},
    }
    rows = _by_id(fidelity_rows({"fp32": found, "int8": found}))
    ratio = rows["long_context.perplexity_ratio"]
    assert (ratio.value, ratio.baseline_value, ratio.met) == (pytest.approx(1.05), 18.0, False)
    recall = rows["long_context.needle_block_recall"]
    assert (recall.value, recall.baseline_value, recall.met) == (0.98, 100, True)
    assert rows["long_context.needle_block_recall.niah_single_1"].value == 0.8
    assert "long_context.needle_block_recall.documents" not in rows
    assert rows["long_context.attention_mass.fp32.documents"].interval == (0.6, 0.9)
    assert rows["long_context.token_agreement.fp32.8192"].value == 0.9
    passkeys = rows["long_context.passkeys.8192"]
    assert (passkeys.value, passkeys.baseline_value) == (0.5, 0.75)
    table = render_passkeys({"int8": found}, (0.0, 1.0))
    assert table.splitlines()[0] == "| tokens | attention | depth 0% | depth 100% |"
    assert table.splitlines()[1] == "|---|---|---|---|"
    assert "| 8192 | sparse, int8 | 100% | 0% |" in table


def test_bars_of_what_was_not_measured_are_there() -> None:
    rows = [*fidelity_rows({}), *task_rows({})]
    assert all(row.value is None and row.bar for row in rows)
    names = ("perplexity_ratio", "needle_block_recall", "worst_task_drop")
    assert {row.id.removeprefix("long_context.") for row in rows} == {
        *names,
        *(f"{name}.fp32" for name in names),
    }
    scores = {(task, 4096): ([[0.9]], [[0.9]]) for task in "abcd"}
    served = _by_id(task_rows({"int8": {"scores": scores, "agreement": 0.9}}))
    assert served["long_context.worst_task_drop"].value == 0
    assert served["long_context.worst_task_drop.fp32"].value is None


def test_a_precision_counts_once_all_of_its_parts_are_there(tmp_path: Path) -> None:
    parts = StoredParts(tmp_path)
    for name in ("int8_text", "int8_recall", "fp32_text"):
        parts.once(name, dict)

    def names_of(precision: str) -> list[str]:
        return [f"{precision}_text", f"{precision}_recall"]

    assert list_measured(parts, names_of) == ["int8"]
    parts.once("fp32_recall", dict)
    assert list_measured(parts, names_of) == ["int8", "fp32"]


def test_the_training_of_gates_is_shown_over_tokens() -> None:
    steps = [
        {"tokens": 1000 * (at + 1), "loss": 1.0 / (at + 1), "recall": 0.5 + at / 100}
        for at in range(20)
    ]
    steps[0] |= {"loss": None, "recall": None}
    text = render_gates({"result": steps, "seconds": 7.4, "device": "a CPU"}, points=4)
    assert text.splitlines()[0] == "0.0 million tokens in 20 steps, 7 s on a CPU."
    assert "| 5,000 | 0.321 | 52.5% |" in text.splitlines()
    assert len(text.splitlines()) == 4 + 4
