"""The precision benchmark: its parts, each stored when it has been measured, and the record."""

from pathlib import Path
from typing import Any

from jobs.benchmarks.parts import StoredParts
from jobs.benchmarks.precision_arms import ARMS
from jobs.benchmarks.precision_failures import FAILURES, run_failure
from jobs.benchmarks.precision_report import failure_rows, render_failures, step_rows
from jobs.benchmarks.precision_steps import SHAPES, measure_steps
from r1ray.evaluation.record import build_record, describe_run, render_table, write_json

__all__ = ["PrecisionBenchmark"]

_TARGET = Path("docs/benchmarks")


class PrecisionBenchmark:
    """What `jobs.bench_precision` measures; every result is kept in `work`."""

    def __init__(self, work: Path, num_steps: int) -> None:
        self._parts, self._num_steps = StoredParts(work), num_steps

    def steps(self) -> dict[str, Any]:
        """From a model's shape -> step times and losses of the arms, which take turns."""
        counts = {shape: self._num_steps // (8 if shape == "smollm2" else 1) for shape in SHAPES}
        return {
            shape: self._parts.once(f"steps_{shape}_{count}", measure_steps, shape, count)
            for shape, count in counts.items()
        }

    def failures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """From failure -> arm -> what training did."""
        runs: dict[str, dict[str, dict[str, Any]]] = {}
        for failure in FAILURES:
            runs[failure] = {}
            for arm in ARMS:
                run = self._parts.once(f"failure_{failure}_{arm}", run_failure, failure, arm)
                print(f"  {failure}, {arm}: held-out loss {run['final_loss']}", flush=True)
                runs[failure][arm] = run
        return runs

    def file_record(self, command: str) -> str:
        """Write the record and its tables; returns the tables."""
        steps, failures = self.steps(), self.failures()
        rows = [*step_rows(steps), *failure_rows(failures)]
        record = build_record("precision", command, rows, self._parts.circumstances())
        _TARGET.mkdir(parents=True, exist_ok=True)
        write_json(_TARGET / "precision.json", {**record, "provoked_failures": failures})
        tables = f"{render_table(rows)}\n## Provoked failures\n\n{render_failures(failures)}"
        text = f"# Dynamic mixed precision\n\n{describe_run(record)}\n\n{tables}\n{_NOTES}"
        (_TARGET / "precision.md").write_text(text, encoding="utf-8")
        return tables


_NOTES = """
- Steps: four layers of SmolLM2's sizes and a vocabulary of 512 (14M parameters), two micro-batches
  of 4 x 128 tokens, dense exchange, all threads; the arms take each step in turn, in one process.
  The ratio is that of the summed times, with a bootstrapped 95% interval, promoted and skipped
  steps included. bf16 pays only where the processor multiplies it: the bar is for AVX512-BF16
  (flags above). `.width_256`: four layers of width 256 (3.1M parameters), where less of a step is
  matrix products. `.smollm2`: all of SmolLM2's size, 30 layers and 49,152 tokens, for an eighth of
  the steps.
- The controller's share is the time in its measuring pass, its decisions and its forward hooks;
  what the promoted group's fp32 products cost is in the throughput. Its patience is shortened (10
  steps of underflow, 30 clean steps), so that a promotion and a demotion fall into the run; they
  are brought about by two batches with a layer's output NaN, which every arm skips.
- Loss gap: |loss / fp32's - 1| on held-out text, evaluated in fp32.
- Failures: fp16 autocast on the CPU, a 3-layer decoder of width 32, 400 steps; patience 10 and 60.
  Survived: training runs to its end, all weights are finite, and the held-out loss is at most 2%
  above that of fp32 under the same provocation. `wide range` counts as survived when both of its
  forms are. `plain` is autocast alone (policy none): r1ray's exchange skips steps that are not
  finite in every arm, and training stops after three in a row (except under GradScaler's
  semantics, which never gives up); a plain torch loop would have NaN weights after the first.
- GradScaler: scale 2^16 of the mean loss, halved on overflow, doubled after twice as many clean
  steps as the controller demotes after (2,000 by default, shortened with its patience); a unit test
  holds the reimplementation against torch.amp.GradScaler.
"""
