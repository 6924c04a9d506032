"""How fast one replica reads and writes: measured at its start, and with every step after it.

1. Writing: the time of a step that gives a token to each of so many sequences.
2. Reading: the time of a prompt's token by how far into the prompt it is, in ranges that double:
   64, 128, 256, ... tokens.
3. Both are running means. What a step takes beyond one that only writes is for what it read.
4. Who has nothing to do would stay as slow, or as fast, as it once was. So where one forward that
   belongs to nobody takes another time than the one before it, everything is taken to.

Price: microseconds a step; at the start `measure_speed` takes the seconds that it is given.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.ops.block_selection import BLOCK

__all__ = ["Speed", "SpeedMeter", "measure_speed"]

_NEW = 0.3  # weight of the latest step
_STEPS = 6  # that are measured of every number of sequences
_LENGTHS = (256, 1024, 4096)


@dataclass(frozen=True)
class Speed:
    """What was measured; at least one of each.

    Attributes:
        step_s: (sequences, seconds of a step that writes a token of each), ascending.
        token_s: (position, seconds of a prompt's token before it), ascending; the last also for
            those behind it.
    """

    step_s: tuple[tuple[int, float], ...]
    token_s: tuple[tuple[int, float], ...]

    def writing_s(self, sequences: float) -> float:
        """Seconds of a step for so many sequences: interpolated, and flat beyond both ends."""
        before = self.step_s[0]
        for point in self.step_s:
            if point[0] >= sequences:
                share = (sequences - before[0]) / max(point[0] - before[0], 1)
                return before[1] + max(share, 0.0) * (point[1] - before[1])
            before = point
        return before[1]

    def reading_s(self, tokens: int, start: int = 0) -> float:
        """Seconds of `tokens` tokens of a prompt behind `start` others."""
        total, done, stop = 0.0, start, start + tokens
        for position, seconds in self.token_s:
            part = max(min(stop, position) - done, 0)
            total, done = total + part * seconds, done + part
        return total + (stop - done) * self.token_s[-1][1]


class SpeedMeter:
    """Not thread-safe: who runs the steps notes them; what `speed` gives never changes."""

    _step_s: dict[int, float]
    _token_s: dict[int, float]
    _idle_s: float | None
    _speed: Speed | None

    def __init__(self) -> None:
        self.forget()

    @property
    def speed(self) -> Speed | None:
        """As of now; None before both kinds of step were seen."""
        return self._speed

    def note(self, seconds: float, pieces: Sequence[tuple[int, int]], num_written: int) -> None:
        """A step took so long.

        Args:
            pieces: (start, tokens) of every piece of a prompt that was read.
            num_written: sequences that each got a token beside.
        """
        num_read = sum(count for _, count in pieces)
        if not num_read and not num_written:
            return
        if not num_read:
            _blend(self._step_s, num_written, seconds)
        else:
            beside = 0.0
            if num_written and self._step_s:
                beside = Speed(tuple(sorted(self._step_s.items())), ()).writing_s(num_written)
            each = max(seconds - beside, 0.0) / num_read
            for start, count in pieces:
                _blend(self._token_s, _range_of(start + count), each)
        self._idle_s = None
        self._describe()

    def note_idle(self, seconds: float) -> None:
        """A forward for nobody took so long; steps since the one before were noted themselves."""
        if self._idle_s is not None:
            factor = 1 + _NEW * (seconds / self._idle_s - 1)
            for means in (self._step_s, self._token_s):
                for key in means:
                    means[key] *= factor
            seconds = factor * self._idle_s
            self._describe()
        self._idle_s = seconds

    def forget(self) -> None:
        """What was noted so far."""
        self._step_s, self._token_s = {}, {}
        self._idle_s = self._speed = None

    def _describe(self) -> None:
        if self._step_s and self._token_s:
            self._speed = Speed(
                tuple(sorted(self._step_s.items())), tuple(sorted(self._token_s.items()))
            )


class _Generator(Protocol):
    def add(self, request: GenerationRequest) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def probe(self) -> None: ...


def measure_speed(
    generator: _Generator,
    meter: SpeedMeter,
    *,
    max_sequences: int,
    max_context_tokens: int,
    budget_s: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Let `generator`, which notes its steps in `meter`, answer prompts that are made up.

    One short prompt, so that what is done once is not measured; then steps of one sequence and of
    all; then longer prompts. No step begins after `budget_s`, once there is one of each kind.
    """
    short = max(1, min(BLOCK, max_context_tokens) // 2)

    def answer(prompts: Sequence[int], num_steps: int) -> None:
        names = [str(number) for number in range(len(prompts))]
        for name, length in zip(names, prompts, strict=True):
            room = max_context_tokens - length  # more than it will write
            generator.add(GenerationRequest(name, _ids(length), room, frozenset()))
        done = 0
        while done < num_steps and (meter.speed is None or clock() < stop_at):
            done += bool(generator.step())
        for name in names:
            generator.cancel(name)

    stop_at = clock()  # no more than one step of each kind
    answer([short], 2)
    meter.forget()
    stop_at = clock() + budget_s
    answer([short], _STEPS)
    if max_sequences > 1:
        answer([short] * max_sequences, _STEPS)
    for length in _LENGTHS:
        if length < max_context_tokens and clock() < stop_at:
            answer([length], 1)
    generator.probe()


def _ids(length: int) -> list[int]:
    """Tokens that every vocabulary has; prompts of these lengths differ from the first one on."""
    return [(length + number) % 100 for number in range(length)]


def _range_of(position: int) -> int:
    """The range's end: a power of two."""
    return max(BLOCK, 1 << (position - 1).bit_length())


def _blend(means: dict[int, float], key: int, value: float) -> None:
    means[key] = means[key] + _NEW * (value - means[key]) if key in means else value
