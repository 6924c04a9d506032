"""`python -m tests.fuzz`: every parser of what others write gets inputs that are nearly valid.

Anything but success or a clean error is a failure, and so is an input that computes for `SLOW_S`.
With the same `--seed` the inputs are the same.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.parsers import Parser, build_parsers

SLOW_S = 5.0


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    arguments.add_argument("--inputs", type=int, default=100_000, help="of all parsers together")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", help="the name of one parser")
    found = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="r1ray-fuzz-") as work:
        parsers = [item for item in build_parsers(Path(work)) if found.only in (None, item.name)]
        failures = [
            run(parser, round(found.inputs * parser.share), found.seed) for parser in parsers
        ]
    return 1 if any(failures) else 0


def run(parser: Parser, num_inputs: int, seed: int) -> bool:
    """Whether `parser` failed; says so, and how many inputs it had."""
    num_seen = 0
    slowest_s = 0.0

    def check(drawn: list[Any]) -> None:
        nonlocal num_seen, slowest_s
        for item in drawn:
            num_seen += 1
            started = time.process_time()
            parser.check(item)
            seconds = time.process_time() - started
            slowest_s = max(slowest_s, seconds)
            assert seconds < SLOW_S, f"took {seconds:.1f} s"

    started, failure = time.monotonic(), ""
    try:
        while num_seen < num_inputs:
            seed += 1
            _draw(check, parser, num_batches=(num_inputs - num_seen) // 8 + 1, seed=seed)
    except Exception:
        failure = traceback.format_exc()
    seconds = time.monotonic() - started
    outcome = f"FAILED\n{failure}" if failure else "nothing but clean errors"
    sys.stdout.write(
        f"{parser.name}: {num_seen} inputs in {seconds:.0f} s, the slowest {slowest_s:.2f} s: "
        f"{outcome}\n"
    )
    sys.stdout.flush()
    return bool(failure)


def _draw(
    check: Callable[[list[Any]], None], parser: Parser, *, num_batches: int, seed: int
) -> None:
    configured = settings(
        max_examples=num_batches,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    hypothesis.seed(seed)(configured(given(parser.inputs)(check)))()


if __name__ == "__main__":
    sys.exit(main())
