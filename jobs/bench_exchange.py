"""Train across shaped links, r1ray's exchanges against torch's DDP; file it in docs/benchmarks/.

Every cell is stored in --work as it finishes, and found there by the next start. The whole takes
about three hours on 2 cores; nothing else should run meanwhile. Links are network namespaces of
this machine (Linux, root, iproute2); where they cannot be had, only the arithmetic is printed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.benchmarks.links import why_unavailable
from jobs.cli import run_guarded

PARTS = ("links", "faults", "headline", "grid", "bytes", "quality", "smollm2")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_exchange"), metavar="DIR")
    parser.add_argument("--budget-minutes", type=float, help="start no cell after so long")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.exchange import ExchangeBenchmark
    from jobs.benchmarks.exchange_tables import render_arithmetic

    reason = why_unavailable()
    if reason is not None:
        print(f"links cannot be shaped here: {reason}; only the arithmetic follows\n")
        print(render_arithmetic())
        return 0
    arguments.work.mkdir(parents=True, exist_ok=True)
    budget_s = None if arguments.budget_minutes is None else 60 * arguments.budget_minutes
    benchmark = ExchangeBenchmark(arguments.work, budget_s)

    def measure() -> None:
        is_complete = benchmark.run(arguments.only)
        if is_complete and set(arguments.only) == set(PARTS):
            command = shlex.join(["python", "-m", "jobs.bench_exchange", *sys.argv[1:]])
            print(benchmark.file_record(command))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
