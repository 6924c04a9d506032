"""What the hardware benchmark makes of its figures."""

import pytest

from jobs.benchmarks.hardware import engine_rows, routing_rows
from r1ray.evaluation.record import Row


def arm(prefill: float, decode: float) -> dict[str, list[float]]:
    return {"prefill": [prefill] * 3, "decode_1": [decode] * 3, "decode_8": [2 * decode] * 3}


def by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def test_torch_is_whichever_format_was_fastest() -> None:
    found = {
        "native": arm(0.1, 0.01),
        "openvino": arm(0.3, 0.01),
        "torch_int8": arm(9.0, 0.09),
        "torch_fp32": arm(0.5, 0.03),
        "torch_bf16": arm(0.4, 0.05),
    }
    rows = by_id(engine_rows(found))
    # 0.5 + 128 · 0.03 against 0.1 + 128 · 0.01
    claim = rows["hardware.native_vs_torch"]
    assert claim.value == pytest.approx(4.34 / 1.38)
    assert claim.met
    assert rows["hardware.native_vs_torch_bf16"].value == pytest.approx(6.8 / 1.38)
    assert rows["hardware.prefill.native_vs_torch"].value == pytest.approx(4)
    assert rows["hardware.decode_8.native_vs_torch"].value == pytest.approx(3)
    assert rows["hardware.decode_1.native_vs_openvino"].value == pytest.approx(1)
    assert rows["hardware.native.prefill"].value == pytest.approx(5120)
    assert rows["hardware.openvino.decode_8"].value == pytest.approx(20)


def test_routing_is_compared_round_by_round() -> None:
    def rounds(*makespans: float) -> list[dict[str, object]]:
        return [{"makespan_s": item, "answer_s": [item / 4, item / 2, item]} for item in makespans]

    found = {"routed": rounds(10, 20, 30), "in_turns": rounds(20, 20, 90)}
    rows = by_id(routing_rows(found))
    makespan = rows["hardware.routed_makespan_vs_in_turns"]
    assert (makespan.value, makespan.interval) == (0.5, (pytest.approx(1 / 3), 1.0))
    assert makespan.met
    assert rows["hardware.routed_p50_vs_in_turns"].baseline_value == 10
