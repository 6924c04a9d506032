"""Measure what is forgotten when four families are learned in a row, by method.

Every part (an arm of a seed) is stored in --work as it finishes, and found there by the next start.
On one core of a small machine a part takes two to four minutes; --processes runs several at once.
The figures go to docs/benchmarks/.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen arms; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_continual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms to measure; all if left out")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_continual"), metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of every family")
    parser.add_argument("--problems", type=int, default=200, help="held out, of every family")
    parser.add_argument("--processes", type=int, default=2, help="parts measured at once")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.continual import ContinualBenchmark
    from jobs.benchmarks.continual_arms import Scale

    scale = Scale(arguments.steps, arguments.problems, arguments.device)
    benchmark = ContinualBenchmark(arguments.work, scale, arguments.seeds, arguments.processes)

    def measure() -> None:
        benchmark.measure(arguments.only)
        if benchmark.is_complete:
            command = shlex.join(["python", "-m", "jobs.bench_continual", *sys.argv[1:]])
            print(benchmark.file_record(command))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
