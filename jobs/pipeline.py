"""The whole way: base, prepare, train, compress, evaluate, then serve a few questions and stop.

Where Ray runs this driver on another node than its head, nothing is served.
"""

import shlex
import sys
import time

from jobs.cli import connected_to_ray, print_summary, run_job
from jobs.serve import ask_heldout_questions, serving
from r1ray.config import PipelineConfig


def run_pipeline(config: PipelineConfig, *, job: str = "pipeline") -> None:
    """Run what has not finished yet; then serve, ask, shut down, and write the report.

    Args:
        job: the name under which this was started, for the report.
    """
    with connected_to_ray():
        from r1ray.pipeline import Pipeline
        from r1ray.serving.app import check_port_is_free, is_on_head

        if serves := is_on_head():
            check_port_is_free(config.serve.host, config.serve.port)  # not after all the stages
        pipeline = Pipeline(config)
        print_summary(pipeline.prepare().local_dir)
        command = shlex.join(["python", "-m", f"jobs.{job}", *sys.argv[1:]])
        pipeline.write_report(command=command)  # whatever serving may bring
        if not serves:
            print("pipeline: no server is tried: this driver is not on the head, where one listens")
            return
        started = time.monotonic()
        with serving(pipeline) as url:
            ask_heldout_questions(pipeline, url)
        serve_s = time.monotonic() - started
        print(f"report: {pipeline.write_report(command=command, serve_s=serve_s)}")


if __name__ == "__main__":
    sys.exit(run_job("pipeline", __doc__ or "", run_pipeline))
