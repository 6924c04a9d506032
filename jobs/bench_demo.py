"""File the demo's measured figures: its report, record and plots go to docs/benchmarks/."""

import shutil
import sys
from pathlib import Path

from jobs.benchmarks.parts import check_is_committed
from jobs.cli import run_job
from jobs.pipeline import run_pipeline
from r1ray.config import PipelineConfig
from r1ray.errors import ArtifactError
from r1ray.files import read_json

TARGET = Path("docs/benchmarks")
PLOTS = ("accuracy.png", "training.png", "size_latency.png")


def file_figures(config: PipelineConfig) -> None:
    """Run what has not been measured yet, then copy the report beside the other benchmarks."""
    check_is_committed()
    run_pipeline(config, job="bench_demo")
    source = Path(config.run.root) / config.run.name
    topic = config.run.name
    record = read_json(source / "report.json")
    made_by = {"the report": record["commit"], **record["stage_commits"]}
    changed = [stage for stage, commit in made_by.items() if str(commit).endswith("+")]
    if changed:
        raise ArtifactError(
            f"{', '.join(changed)}: made with uncommitted changes; remove {source} and run it again"
        )
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
