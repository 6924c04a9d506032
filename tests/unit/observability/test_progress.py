"""Progress in a log file: few lines, the figures that were passed, and the time left."""

import io

import pytest
from rich.console import Console

from r1ray.observability import progress as module
from r1ray.observability.progress import StageProgress


class FakeClock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_time_left_leaves_out_the_start_up_before_the_first_update(clock: FakeClock) -> None:
    out = io.StringIO()
    with StageProgress("train", "step", 10, Console(file=out, width=20)) as progress:
        clock.now = 100.0
        progress.update(1, "loss 3.0")
        clock.now = 120.0
        progress.update(2, "loss 2.0")
    assert "train: step 2/10 loss 2.0, 2.7 min left" in out.getvalue()


def test_lines_come_at_most_every_ten_seconds_but_always_at_both_ends(clock: FakeClock) -> None:
    out = io.StringIO()
    with StageProgress("train", "step", 30, Console(file=out, width=200)) as progress:
        for step in range(1, 31):
            clock.now += 1.0
            progress.update(step)
    steps = [line.split()[2] for line in out.getvalue().splitlines() if "step" in line]
    assert steps == ["1/30", "11/30", "21/30", "30/30"]


def test_a_stage_that_fails_says_by_what(clock: FakeClock) -> None:
    out = io.StringIO()
    with pytest.raises(ZeroDivisionError), StageProgress("x", "y", 1, Console(file=out)):
        1 / 0  # noqa: B018
    assert "x: stopped by ZeroDivisionError" in out.getvalue()
