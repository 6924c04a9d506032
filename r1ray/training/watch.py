"""What the driver makes of the workers' progress: steps shown, restarts timed."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from r1ray.errors import R1RayError
from r1ray.training.step import StepRecord

__all__ = ["Posted", "Recovery", "Watch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Posted:
    """What rank 0 has posted.

    Attributes:
        num_starts: of the worker group.
        started_at: the step that its last start went on from.
        last: the latest record since that start.
        plan: why the exchange was chosen, where one was.
        fatal: why training stopped, where starting it again would only lead to the same point.
    """

    num_starts: int = 0
    started_at: int = 0
    last: StepRecord | None = None
    plan: str | None = None
    fatal: R1RayError | None = field(default=None, compare=False)

    def with_start(self, step: int) -> "Posted":
        return replace(self, num_starts=self.num_starts + 1, started_at=step, last=None)

    def with_record(self, record: StepRecord, plan: str | None) -> "Posted":
        return replace(self, last=record, plan=plan)

    def with_fatal(self, error: R1RayError) -> "Posted":
        return replace(self, fatal=error)


@dataclass(frozen=True)
class Recovery:
    """One restart of the worker group after a failure.

    Attributes:
        seconds: from the last step seen before it to the first step after it.
        lost_steps: steps that were done again.
    """

    seconds: float
    lost_steps: int


@dataclass
class Watch:
    """Follows what is posted; `look` is called a few times a second.

    Attributes:
        on_step: called with every record seen.
        recoveries: the restarts so far.
    """

    on_step: Callable[[StepRecord], None]
    clock: Callable[[], float] = time.monotonic
    recoveries: list[Recovery] = field(default_factory=list)
    _seen: Posted = field(default_factory=Posted)
    _last_step: int | None = None
    _last_time: float = 0.0
    _is_restarting: bool = False

    def look(self, posted: Posted) -> None:
        """Take note of what changed since the last look."""
        if posted.num_starts != self._seen.num_starts:
            self._is_restarting = self._last_step is not None
            if posted.started_at:
                logger.info("resuming after step %d", posted.started_at)
        if posted.plan is not None and posted.plan != self._seen.plan:
            logger.info("%s", posted.plan)
        if posted.last is not None and posted != self._seen:
            if self._is_restarting:
                self._note_recovery(posted.started_at)
            self._last_step, self._last_time = posted.last.step, self.clock()
            self.on_step(posted.last)
        self._seen = posted

    def _note_recovery(self, started_at: int) -> None:
        assert self._last_step is not None, "a restart follows a step"
        self._is_restarting = False
        recovery = Recovery(self.clock() - self._last_time, max(0, self._last_step - started_at))
        self.recoveries.append(recovery)
        logger.info(
            "recovered %.1f s after step %d; %d steps are done again",
            recovery.seconds,
            self._last_step,
            recovery.lost_steps,
        )
