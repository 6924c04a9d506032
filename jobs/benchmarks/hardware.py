"""The hardware benchmark: its parts, each stored when it has been measured, and the record."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.base_files import BaseFiles
from jobs.benchmarks.hardware_engines import PROMPT, STREAMS
from jobs.benchmarks.hardware_routing import measure_routing
from jobs.benchmarks.parts import StoredParts
from jobs.benchmarks.peer_environments import run_module
from r1ray.evaluation.record import (
    Row,
    build_record,
    describe_run,
    render_table,
    write_json,
)

__all__ = ["HardwareBenchmark", "engine_rows", "routing_rows"]

_PORT = 8733
_NEW = 128  # tokens of the request that stands for all

Engines = Mapping[str, Mapping[str, Sequence[float]]]
Rounds = Mapping[str, Sequence[Mapping[str, Any]]]


class HardwareBenchmark:
    """What `jobs.bench_hardware` measures; every result is kept in `work`."""

    def __init__(
        self, work: Path, source: str, *, num_threads: int, repeats: int, num_requests: int
    ) -> None:
        self._work, self._files = work, BaseFiles(work, source)
        self._num_threads = num_threads
        self._repeats, self._num_requests = repeats, num_requests
        self._parts = StoredParts(work)

    def engines(self) -> Engines:
        """From arm -> what -> seconds."""
        return self._parts.once("engines", self._measure_engines)

    def routing(self) -> Rounds:
        """From arm -> rounds of the load."""
        return self._parts.once("routing", self._measure_routing)

    def file_record(self, command: str, target: Path) -> str:
        """Write the record and its table into `target`; returns the table."""
        rows = [*engine_rows(self.engines()), *routing_rows(self.routing())]
        target.mkdir(parents=True, exist_ok=True)
        record = build_record("hardware", command, rows, self._parts.circumstances())
        write_json(target / "hardware.json", record)
        table = render_table(rows)
        text = f"# Hardware\n\n{describe_run(record)}\n\n{table}\n{_NOTES}"
        (target / "hardware.md").write_text(text, encoding="utf-8")
        return table

    def _measure_engines(self) -> Engines:
        task = {
            "model": str(self._files.int8()),
            "base": str(self._files.base()),
            "ids": str(self._files.ids()),
            "num_threads": self._num_threads,
            "repeats": self._repeats,
        }
        return run_module("jobs.benchmarks.hardware_engines", task, self._work)

    def _measure_routing(self) -> Rounds:
        from jobs.cli import connected_to_ray

        ids = json.loads(self._files.ids().read_text(encoding="utf-8"))
        with connected_to_ray():
            return measure_routing(self._files.int8(), ids, self._num_requests, _PORT)


def engine_rows(found: Engines) -> list[Row]:
    """Our kernels against the others, by ratios of the same repetition; and everybody's times."""
    whats = ("prefill", *(f"decode_{streams}" for streams in STREAMS))
    times = {what: {arm: items[what] for arm, items in found.items()} for what in whats}
    whole = {
        arm: [
            prefill + _NEW * step
            for prefill, step in zip(items["prefill"], items["decode_1"], strict=True)
        ]
        for arm, items in found.items()
    }
    rows = [_speed("hardware.native_vs_torch", _add_best(whole), "torch", bar=">= 2")]
    rows += [_speed(f"hardware.native_vs_{arm}", whole, arm) for arm in found if arm != "native"]
    for what in whats:
        best = _add_best(times[what])
        rows += [
            _speed(f"hardware.{what}.native_vs_{arm}", best, arm) for arm in ("torch", "openvino")
        ]
    for arm, items in found.items():
        rate = PROMPT / statistics.median(items["prefill"])
        rows.append(Row(f"hardware.{arm}.prefill", rate, "tokens/s"))
        for streams in STREAMS:
            step_ms = 1e3 * statistics.median(items[f"decode_{streams}"])
            rows.append(Row(f"hardware.{arm}.decode_{streams}", step_ms, "ms a step"))
    return rows


def _add_best(seconds: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """With "torch": in every repetition the fastest of torch's number formats."""
    formats = [items for arm, items in seconds.items() if arm.startswith("torch_")]
    return {**seconds, "torch": [min(each) for each in zip(*formats, strict=True)]}


def routing_rows(found: Rounds) -> list[Row]:
    """Routed by time over in turns: makespan, and the answers' median and 95th percentile."""
    times = {
        arm: {
            "makespan": [item["makespan_s"] for item in rounds],
            "p50": [float(np.percentile(item["answer_s"], 50)) for item in rounds],
            "p95": [float(np.percentile(item["answer_s"], 95)) for item in rounds],
        }
        for arm, rounds in found.items()
    }
    rows = []
    for what in ("makespan", "p50", "p95"):
        routed, in_turns = times["routed"][what], times["in_turns"][what]
        ratios = [mine / other for mine, other in zip(routed, in_turns, strict=True)]
        rows.append(
            Row(
                f"hardware.routed_{what}_vs_in_turns",
                statistics.median(ratios),
                "x the time",
                (min(ratios), max(ratios)),
                "each replica in turn, s",
                statistics.median(in_turns),
                "< 1",
            )
        )
    return rows


def _speed(
    row_id: str, seconds: Mapping[str, Sequence[float]], baseline: str, bar: str | None = None
) -> Row:
    """The speed of "native" over that of `baseline`."""
    ratios = np.asarray(seconds[baseline]) / np.asarray(seconds["native"])
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Row(
        row_id,
        float(np.median(ratios)),
        "x the speed",
        (float(low), float(high)),
        f"{baseline}, s",
        statistics.median(seconds[baseline]),
        bar,
    )


_NOTES = f"""
- SmolLM2-135M; two threads, if the command does not say otherwise. native: INT8 weights,
  activations, keys and values by r1ray's kernels; openvino: the same weights, with float32
  activations, as equal logits ask (its default on processors with bfloat16 is that);
  torch_int8: the same model where the kernels were not built; torch_fp32 and torch_bf16: the float
  model, as torch runs it; torch: whichever of the three was fastest in a repetition.
- native_vs_*: one prompt of {PROMPT} tokens and {_NEW} tokens behind it. Arms in turn within every
  repetition; intervals are of the repetitions' ratios.
- routed: a replica with r1ray's kernels and one with OpenVINO, a thread each, as two groups of one
  model; in turns: two like them as two models that the client asks in turn. Requests come at
  random, two a second, with 16 to 1,500 tokens and answers of 16 to 128; the same ones for both.
  Three rounds each, in turns; the interval is their range.
"""
