"""File the demo's measured figures: its report, record and plots go to docs/benchmarks/."""

import shutil
import sys
from pathlib import Path

from jobs.benchmarks.parts import check_is_committed
from jobs.cli import run_job
from jobs.pipeline import run_pipeline
from r1ray.config import PipelineConfig

TARGET = Path("docs/benchmarks")
PLOTS = ("accuracy.png", "training.png", "size_latency.png")


def file_figures(config: PipelineConfig) -> None:
    """Run what has not been measured yet, then copy the report beside the other benchmarks."""
    check_is_committed()
    run_pipeline(config, job="bench_demo")
    source = Path(config.run.root) / config.run.name
    topic = config.run.name
    TARGET.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "report.json", TARGET / f"{topic}.json")
    text = (source / "report.md").read_text(encoding="utf-8")
    for plot in PLOTS:
        shutil.copyfile(source / plot, TARGET / f"{topic}_{plot}")
        text = text.replace(f"({plot})", f"({topic}_{plot})")
    (TARGET / f"{topic}.md").write_text(text, encoding="utf-8")
    print(f"filed: {TARGET / topic}.json and .md")


if __name__ == "__main__":
    sys.exit(run_job("bench_demo", __doc__ or "", file_figures))
