"""The exchange benchmark stores its cells, goes on where it was, and does its sums right."""

import math
from pathlib import Path
from typing import Any

import pytest

from jobs.benchmarks import exchange
from jobs.benchmarks.exchange import ExchangeBenchmark
from jobs.benchmarks.exchange_cells import ARMS, PARTS, Arm, Cell, plan_cells, train_values
from jobs.benchmarks.exchange_report import (
    build_rows,
    bytes_rows,
    gap_rows,
    steady_arms,
    time_rows,
    times_to_target,
)
from jobs.benchmarks.exchange_run import summarize
from jobs.benchmarks.exchange_tables import render_arithmetic, render_cells, write_report
from jobs.benchmarks.exchange_worker import WorkerResult
from jobs.benchmarks.parts import StoredParts
from r1ray.config.training import TrainConfig
from r1ray.errors import ArtifactError, ExchangeError
from r1ray.evaluation.record import Row, build_record

_SPEED = {"ddp_fp32": 1.0, "ddp_bf16": 0.5, "delta4": 0.3, "delta4_async": 0.2, "stream": 0.08}


def _result(cell: Cell) -> dict[str, Any]:
    """A made-up result: the loss falls from 2 to 1; stream misses the target with seed 0."""
    step_s = _SPEED.get(cell.arm, 0.4)
    misses = cell.arm == "stream" and cell.seed == 0
    losses = [2.0, 1.5, 1.005, 1.2 if misses else 1.0]
    kept = [cell.num_steps // 4 * quarter for quarter in (1, 2, 3)] + [cell.num_steps]
    sent = 1000 if cell.arm.startswith(("ddp", "dense")) else 100 + cell.num_workers
    worker = WorkerResult(
        ended_s=[step_s * (number + 1) for number in range(cell.num_steps)],
        waited_s=[None if cell.arm.startswith("ddp") else 0.0] * cell.num_steps,
        sent=[sent * (number + 1) for number in range(cell.num_steps)],
        received=[0] * cell.num_steps,
        kept=kept if cell.eval_every else [],
        digest="same" if cell.arm != "stream" else f"at {cell.rate_mbit}",
    )
    if misses:
        losses[2] = 1.3
    workers = [worker] * cell.num_workers
    return summarize(cell, workers, losses, 0.25) if cell.eval_every else summarize(cell, workers)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [{"commit": "abc", **_result(cell)} for part in PARTS for cell in plan_cells(part)]


def _by_id(rows: list[Row]) -> dict[str, Row]:
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}


def test_cells_have_names_of_their_own_and_settings_that_training_accepts() -> None:
    cells = [cell for part in PARTS for cell in plan_cells(part)]
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        config = TrainConfig(**train_values(cell))
        assert config.num_steps == cell.num_steps
        assert config.exchange.type == (
            "dense" if cell.arm.startswith(("ddp", "alone")) else cell.arm.split("_h")[0]
        )


def test_the_arms_of_a_seed_and_rate_follow_one_another() -> None:
    cells = plan_cells("headline")
    places = {(cell.seed, cell.rate_mbit): [] for cell in cells}
    for place, cell in enumerate(cells):
        places[cell.seed, cell.rate_mbit].append(place)
    assert all(found == list(range(found[0], found[0] + 6)) for found in places.values())


def test_a_summary_is_rank_0_s_clock_and_means_over_the_workers() -> None:
    cell = Cell("test", "delta4", 2, 200, 0, num_steps=4)
    first = WorkerResult([1.0, 2.0], [0.2, 0.4], [10, 30], [5, 9], [1, 2], "x")
    second = WorkerResult([1.1, 2.1], [0.0, 0.2], [30, 50], [5, 9], [], "y")
    summary = summarize(cell, [first, second], [3.0, 2.0], 0.5)
    assert summary["steps_done"] == 2
    assert summary["step_s"] == 1.0
    assert summary["waited_share"] == pytest.approx(0.2)
    assert summary["sent"] == [20, 40]
    assert summary["sent_per_step"] == 20
    assert summary["curve"][1] == {"step": 2, "seconds": 2.0, "loss": 2.0}
    assert summary["has_equal_weights"] is False


def test_time_to_loss_counts_from_the_first_weights_within_a_percent(
    results: list[dict[str, Any]],
) -> None:
    num_steps = next(cell.num_steps for cell in plan_cells("headline"))
    reached = num_steps // 4 * 3
    (num_streamed,) = {cell.num_steps for cell in plan_cells("headline") if cell.arm == "stream"}
    streamed = reached / (0.08 * (num_streamed // 4 * 3))
    assert times_to_target(results, "ddp_fp32", 200) == pytest.approx([reached] * 3)
    assert times_to_target(results, "stream", 50)[0] == math.inf
    rows = _by_id(time_rows(results))
    best = rows["exchange.time_to_loss_vs_ddp_fp32_200mbit"]
    assert best.value == pytest.approx(streamed)
    assert best.unit == "x faster (stream)"
    assert best.interval == pytest.approx((0.0, streamed))  # missed with one seed
    assert best.met is True
    assert rows["exchange.time_to_loss_vs_ddp_bf16_50mbit"].met is False  # 3.9x, the bar is 4
    assert rows["exchange.time_to_loss_vs_ddp_fp32_50mbit.delta4"].value == pytest.approx(1 / 0.3)


def test_the_share_of_bytes_is_the_worst_over_the_numbers_of_workers(
    results: list[dict[str, Any]],
) -> None:
    rows = _by_id(bytes_rows(results))
    assert rows["exchange.delta4_bytes_share.2w"].value == pytest.approx(0.102)
    assert rows["exchange.delta4_bytes_share"].value == pytest.approx(0.108)
    assert rows["exchange.stream_bytes_share"].met is False


def test_loss_gaps_are_taken_seed_by_seed(results: list[dict[str, Any]]) -> None:
    changed = [dict(cell) for cell in results]
    for cell in changed:
        if cell["part"] == "quality" and cell["model"] == "small":
            factor = {"delta4": 1.005, "delta4_async": 1.02}.get(cell["arm"], 1.0)
            cell["final_loss"] = (1 + cell["seed"]) * factor
    rows = _by_id(gap_rows(changed))
    assert rows["exchange.delta4_loss_gap"].value == pytest.approx(0.005)
    assert rows["exchange.delta4_loss_gap"].met is True
    assert rows["exchange.delta4_async_loss_gap"].value == pytest.approx(0.02)
    assert rows["exchange.delta4_async_loss_gap"].met is False


def test_every_cell_is_in_the_report(results: list[dict[str, Any]], tmp_path: Path) -> None:
    links = {"mbit_per_s": {"200": {"one_to_one": 190.0}}}
    rows = build_rows(results, links, {"killed": 12.5})
    assert _by_id(rows)["exchange.recovery_s.killed"].value == 12.5
    assert _by_id(rows)["exchange.runs_ending_in_equal_weights"].met is True
    table = render_cells(results)
    lines = table.splitlines()[2:]
    keys = ("part", "model", "num_workers", "rate_mbit", "arm")
    assert len(lines) == len({tuple(cell[key] for key in keys) for cell in results})
    assert "missed by 1 of 3" in table
    assert steady_arms(results)["stream"] == 0
    grid = [line for line in lines if line.startswith("| grid")]
    assert all("~" not in line for line in grid if "| stream |" in line)
    assert any("~" in line for line in grid if "| delta4 |" in line)
    parts = StoredParts(tmp_path / "work")
    record = build_record("exchange", "x", rows, parts.circumstances())
    write_report(record, rows, results, tmp_path)
    assert {path.name for path in tmp_path.glob("exchange*")} == {
        "exchange.md",
        "exchange_loss.png",
        "exchange_bytes.png",
    }


def test_the_arithmetic_is_that_of_a_ring() -> None:
    # 2 · 3/4 · 2e6 parameters · 32 bits at 200 Mbit/s
    assert "| dense fp32 | 32 | 4 | 1.9200 s | 0.4800 s | 0.0960 s |" in render_arithmetic(2e6)


class _FakeRunner:
    failing: str | None = None
    ran: list[str]

    def run(self, cell: Cell) -> dict[str, Any]:
        self.ran.append(cell.name)
        if cell.name == self.failing:
            raise ExchangeError("worker 1 ended with -9")
        return _result(cell)


def _benchmark(work: Path, runner: _FakeRunner, budget_s: float | None = None) -> ExchangeBenchmark:
    benchmark = ExchangeBenchmark(work, budget_s)
    benchmark._runner = runner  # type: ignore[assignment]
    runner.ran = []
    return benchmark


def test_cells_are_stored_and_only_what_failed_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = plan_cells("smollm2")
    monkeypatch.setattr(exchange, "_measure_links", dict)
    runner = _FakeRunner()
    runner.failing = cells[2].name
    assert not _benchmark(tmp_path, runner, budget_s=-1).run(["smollm2"])
    assert runner.ran == []
    _benchmark(tmp_path, runner).run(["smollm2"])
    assert runner.ran == [cell.name for cell in cells]
    runner.failing = None
    benchmark = _benchmark(tmp_path, runner)
    assert benchmark.run(["smollm2"])
    assert runner.ran == [cells[2].name]
    with pytest.raises(ArtifactError, match="was not measured"):
        benchmark.file_record("x")
    monkeypatch.setitem(ARMS, cells[1].arm, Arm({"type": "dense", "dtype": "bf16"}))
    again = _benchmark(tmp_path, runner)
    again.run(["smollm2"])
    assert runner.ran == [cells[1].name]
