"""Measure dynamic mixed precision against fp32, plain autocast and GradScaler's semantics.

Every part is stored in --work as it finishes, and found there by the next start. The whole takes
about ten minutes on 2 cores; nothing else should run meanwhile. The figures go to docs/benchmarks/.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded

PARTS = ("steps", "failures")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_precision"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=120, help="timed steps an arm")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.precision import PrecisionBenchmark

    arguments.work.mkdir(parents=True, exist_ok=True)
    benchmark = PrecisionBenchmark(arguments.work, arguments.steps)

    def measure() -> None:
        for part in arguments.only:
            print(f"bench_precision: {part}", flush=True)
            getattr(benchmark, part)()
        if set(arguments.only) == set(PARTS):
            command = shlex.join(["python", "-m", "jobs.bench_precision", *sys.argv[1:]])
            print(benchmark.file_record(command))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
