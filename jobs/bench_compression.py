"""Measure quantization, codebooks, distillation and layered memory; file it in docs/benchmarks/.

Every part is stored in --work as it finishes, and found there by the next start, or in
docs/benchmarks/parts/compression, where it was measured on another machine; models are artifacts in
--work. Nothing else should run while `costs`, `latency` and `layers` are measured. All but
`distillation` take two hours on 2 cores; `distillation` some ten minutes on a GPU, and hours for
each student without.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded

PARTS = (
    "quantization",
    "uniform",
    "costs",
    "latency",
    "tails",
    "layers",
    "exports",
    "seeds",
    "distillation",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; with none chosen, file the record, as far as the budget went."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", help="parts to measure, not to be filed"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench_compression"), metavar="DIR")
    parser.add_argument("--budget-minutes", type=float, help="start nothing new after so long")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.compression import CompressionBenchmark

    arguments.work.mkdir(parents=True, exist_ok=True)
    budget_s = None if arguments.budget_minutes is None else 60 * arguments.budget_minutes
    benchmark = CompressionBenchmark(arguments.work, budget_s)

    def measure() -> None:
        benchmark.run(arguments.only)
        if arguments.only is None:
            command = shlex.join(["python", "-m", "jobs.bench_compression", *sys.argv[1:]])
            print(benchmark.file_record(command))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
