"""Rows of the serving record from measured parts, and what time_engine measures."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from jobs.benchmarks.serving_peer_child import time_engine
from jobs.benchmarks.serving_report import (
    condense,
    engine_rows,
    find_strongest,
    render_engines,
    serving_rows,
)


def _engine(rate: float, **more: Any) -> dict[str, Any]:
    found = {
        "tokens_per_s": [rate, rate, 2 * rate],
        "seconds": [2.0, 2.0, 2.0],
        "first_s": [[0.1] * 8] * 3,
        "next_s": [[0.01] * 8 * 99] * 3,
        "peak_resident_bytes": 2**20,
    }
    return {"scenarios": dict.fromkeys(("1x64", "8x64", "32x64"), found), **more}


def _own(rate: float) -> dict[str, list[float]]:
    return dict.fromkeys(("1x64", "8x64", "32x64"), [rate] * 3)


PEERS = [
    _engine(100.0, name="llama_cpp", weights="Q8_0", own=_own(95.0)),
    _engine(50.0, name="openvino", weights="Q8_0", own=_own(60.0)),
    {"name": "vllm", "error": "exit status 1: no wheel"},
]
PARTS: dict[str, Any] = {
    "prefix": {"cold_s": [2.0, 3.0, 4.0], "warm_s": [0.1, 0.1, 0.5]},
    "interference": {
        "sparse": {"alone_s": [0.01] * 200, "reading_s": [0.05] * 98 + [0.08, 0.2]},
        "dense": {"alone_s": [0.05] * 200, "reading_s": [0.3] * 100},
    },
    "admission": {"predicted": [300.0], "worst_case": [200.0], "preempted": [3]},
    "http": [{"seconds": 2.6, "client_cpu_s": 0.2, "engine_s": 2.0}] * 2,
    "soak": {
        "held": {"r1ray:kv_cache_usage_perc": 0.0},
        "lost": [],
        "ends": {"whole": 90, "busy": 10},
        "memory": [
            {"resident_bytes": {"1": 100, "2": 100}},
            {"resident_bytes": {"1": 100, "2": 100}},
            {"resident_bytes": {"2": 110, "3": 100}},
        ],
    },
}


def test_the_best_peer_counts_only_beside_llama_cpp_and_openvino() -> None:
    assert find_strongest(PEERS, "1x64") is PEERS[0]
    assert find_strongest(PEERS[:1], "1x64") is None
    rows = {row.id: row for row in engine_rows(PEERS[1:])}
    assert rows["serving.decode_1_vs_best_peer"].value is None
    assert rows["serving.decode_1_vs_best_peer"].met is None


def test_rows_say_what_is_met() -> None:
    rows = {row.id: row for row in engine_rows(PEERS)}
    assert rows["serving.decode_1_vs_best_peer"].value == pytest.approx(0.95)
    assert rows["serving.decode_1_vs_best_peer"].met
    assert not rows["serving.decode_8_vs_best_peer"].met
    rows = {row.id: row for row in serving_rows(**PARTS)}
    assert rows["serving.shared_prefix_ttft_gain"].value == pytest.approx(30)
    assert rows["serving.p99_itl_share_of_limit"].value == pytest.approx(0.8, abs=0.05)
    assert rows["serving.p99_itl_share_of_limit_dense"].value == pytest.approx(2)
    assert rows["serving.predicted_admission_gain"].value == pytest.approx(1.5)
    assert rows["serving.http_overhead"].value == pytest.approx(1 - 2.0 / 2.5)
    assert not rows["serving.http_overhead"].met
    assert rows["serving.soak_leaked_pages"].met
    assert rows["serving.soak_lost_requests"].met
    assert rows["serving.soak_memory_growth"].value == pytest.approx(1.1)


def test_engines_that_failed_are_in_the_table() -> None:
    table = render_engines(_engine(95.0, settings={}), PEERS)
    assert "| r1ray | int8 | 8x64 | 95 | 0.10 | 10.0, 10.0 | 1 |" in table
    assert "| vllm | | | exit status 1: no wheel" in table


def test_a_record_has_percentiles_of_waits() -> None:
    found = condense(_engine(95.0, name="r1ray"))
    assert found["name"] == "r1ray"
    assert found["scenarios"]["1x64"]["next_s"]["p99"] == pytest.approx(0.01)
    assert found["scenarios"]["1x64"]["tokens_per_s"] == [95.0, 95.0, 190.0]
    assert condense(PEERS[2]) == PEERS[2]


def test_decoding_is_timed_once_all_streams_have_begun() -> None:
    class Fake:
        def __init__(self) -> None:
            self.settings: dict[str, Any] = {}
            self.asked: list[list[int]] = []

        def answer(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[float]]:
            self.asked += prompts
            now = time.perf_counter()
            return [
                [now + 1 + stream + 0.5 * token for token in range(new_tokens)]
                for stream in range(len(prompts))
            ]

    scenario = {"name": "2x3", "streams": 2, "prompt_tokens": 3, "new_tokens": 9, "repeats": 2}
    engine = Fake()
    found = time_engine(engine, list(range(2000)), {"scenarios": [scenario]})["2x3"]
    # The first stream has its third token as the second begins: 6 and 8 are left, in 4 s.
    assert found["tokens_per_s"] == pytest.approx([14 / 4] * 2)
    assert found["first_s"][0] == pytest.approx([1, 2], abs=0.1)
    assert found["seconds"] == pytest.approx([6, 6], abs=0.1)
    assert len({tuple(prompt[:1]) for prompt in engine.asked[1:]}) == 4  # none begins as another
