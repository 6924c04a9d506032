"""Evaluate base, tuned and quantized model, and write report.md, report.json and plots."""

import shlex
import sys

from jobs.cli import connected_to_ray, run_job
from r1ray.config import PipelineConfig


def evaluate(config: PipelineConfig) -> None:
    """Run the stage alone, then the report of what has been measured so far."""
    with connected_to_ray():
        from r1ray.pipeline import Pipeline

        pipeline = Pipeline(config, only="evaluate")
        command = shlex.join(["python", "-m", "jobs.evaluate", *sys.argv[1:]])
        print(f"report: {pipeline.write_report(command=command)}")


if __name__ == "__main__":
    sys.exit(run_job("evaluate", __doc__ or "", evaluate))
