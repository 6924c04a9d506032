"""Teach the published model of a run new data; publish the result unless it forgets too much.

Exit code 3: it does, and what was published stays.
"""

import sys

from jobs.cli import connected_to_ray, print_summary, run_job
from r1ray.config import PipelineConfig


def update(config: PipelineConfig) -> None:
    """Learn, judge and publish; running servers take the new version by themselves."""
    with connected_to_ray():
        from r1ray.updates import run_update

        outcome = run_update(config)
        print_summary(outcome.judged.local_dir)
        when = "published" if outcome.is_new else "published before; there is nothing to do"
        print(f"update: version {outcome.version} is {when}")


if __name__ == "__main__":
    sys.exit(run_job("update", __doc__ or "", update))
