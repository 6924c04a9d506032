"""Progress that a person can follow: a live bar on a terminal, lines in a log file."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["StageProgress"]

_LINE_EVERY_S = 10.0


class StageProgress:
    """Shows how far one stage is: its name, units done of the total, a note, and the time left.

    Args:
        stage: the stage's name.
        unit: what is counted, such as `step` or `problem`.
        total: units in all; None while unknown.
    """

    def __init__(
        self, stage: str, unit: str, total: int | None = None, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True)
        self._stage, self._unit, self._total = stage, unit, total
        self._started = self._last_line = time.monotonic()
        self._first: tuple[int, float] | None = None  # units and time of the first update
        self._bar = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._task = self._bar.add_task(self._stage, total=self._total, note="")
            self._bar.start()
        else:
            self._print_line(f"{self._stage}: started")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        else:
            outcome = "finished" if error is None else f"stopped by {kind.__name__ if kind else ''}"
            seconds = time.monotonic() - self._started
            self._print_line(f"{self._stage}: {outcome} after {seconds:.0f} s")

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` units are finished; `note` carries figures such as the loss."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        is_first = self._first is None
        if self._first is None:
            self._first = (done, now)
        if now - self._last_line < _LINE_EVERY_S and done != self._total and not is_first:
            return
        self._last_line = now
        of_total = "" if self._total is None else f"/{self._total}"
        self._print_line(
            f"{self._stage}: {self._unit} {done}{of_total} {note}{self._time_left(done, now)}"
        )

    def _print_line(self, line: str) -> None:
        """To a log file, in one line however long."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def _time_left(self, done: int, now: float) -> str:
        """From the rate since the first update: what came before was start-up."""
        assert self._first is not None
        first_done, first_time = self._first
        if self._total is None or done <= first_done or done >= self._total:
            return ""
        seconds = (now - first_time) / (done - first_done) * (self._total - done)
        return f", {seconds / 60:.1f} min left" if seconds >= 60 else f", {seconds:.0f} s left"
