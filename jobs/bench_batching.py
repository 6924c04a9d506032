"""Measure batching against its peers, and file the figures in docs/benchmarks/.

Every part is stored in --work as it finishes, and found there by the next start. The whole takes
about an hour on 2 cores; nothing else should run meanwhile.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded

PARTS = ("padding", "throughput", "preallocation", "scale")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_batching"), metavar="DIR")
    parser.add_argument("--batches", type=int, default=120, help="timed batches an arm and set")
    parser.add_argument("--repetitions", type=int, default=5, help="of the preallocation figures")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.batching import BatchingBenchmark

    arguments.work.mkdir(parents=True, exist_ok=True)
    benchmark = BatchingBenchmark(arguments.work, arguments.batches, arguments.repetitions)

    def measure() -> None:
        for part in arguments.only:
            print(f"bench_batching: {part}", flush=True)
            getattr(benchmark, part)()
        if set(arguments.only) == set(PARTS):
            command = shlex.join(["python", "-m", "jobs.bench_batching", *sys.argv[1:]])
            print(benchmark.file_record(command))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
