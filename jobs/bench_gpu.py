"""Measure the CUDA paths on one GPU: training, packing, INT8, codecs, streaming from the host.

About three minutes. The figures go to docs/benchmarks/; models are random, of the sizes named.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jobs.cli import run_guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything; file the record."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    from jobs.benchmarks.gpu import measure_and_file

    command = shlex.join(["python", "-m", "jobs.bench_gpu", *sys.argv[1:]])
    return run_guarded(lambda: print(measure_and_file(command)))


if __name__ == "__main__":
    sys.exit(main())
