"""What a replica knows of its own speed."""

import itertools

import pytest
import torch

from r1ray.models.generation import BatchGenerator
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.speed import Speed, SpeedMeter, measure_speed
from tests.fakes import tiny_model

SPEED = Speed(step_s=((1, 0.01), (4, 0.04)), token_s=((64, 0.001), (256, 0.003)))


@pytest.mark.parametrize(("sequences", "seconds"), [(0.5, 0.01), (1, 0.01), (3, 0.03), (9, 0.04)])
def test_a_step_takes_what_lies_between_those_measured(sequences: float, seconds: float) -> None:
    assert SPEED.writing_s(sequences) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("tokens", "start", "seconds"),
    [(10, 0, 0.01), (100, 0, 0.064 + 0.108), (100, 64, 0.3), (300, 200, 0.9), (0, 0, 0.0)],
)
def test_a_prompt_costs_what_its_ranges_cost(tokens: int, start: int, seconds: float) -> None:
    assert SPEED.reading_s(tokens, start) == pytest.approx(seconds)


def test_what_a_step_takes_beyond_writing_is_for_what_it_reads() -> None:
    meter = SpeedMeter()
    meter.note(0.02, [], 2)
    assert meter.speed is None  # nothing was read yet
    meter.note(0.02 + 0.08, [(0, 64), (0, 16)], 2)
    assert meter.speed == Speed(((2, 0.02),), ((64, pytest.approx(0.001)),))  # type: ignore[arg-type]
    before = meter.speed
    for _ in range(50):
        meter.note(0.05, [], 2)
    assert meter.speed is not None
    assert meter.speed.writing_s(2) == pytest.approx(0.05, rel=1e-3)
    assert before.writing_s(2) == 0.02  # what was given stays


def test_who_is_idle_is_as_slow_as_a_forward_for_nobody_says() -> None:
    meter = SpeedMeter()
    meter.note(0.2, [(0, 10)], 0)
    meter.note(0.01, [], 1)
    meter.note_idle(0.1)  # the first says nothing: all was measured beside it
    assert meter.speed == Speed(((1, 0.01),), ((64, 0.02),))
    for _ in range(50):
        meter.note_idle(0.05)
    assert meter.speed is not None
    assert meter.speed.writing_s(1) == pytest.approx(0.005, rel=1e-3)
    assert meter.speed.reading_s(1) == pytest.approx(0.01, rel=1e-3)
    meter.note(0.005, [], 1)
    meter.note_idle(0.5)  # nor is one that follows a step
    assert meter.speed.writing_s(1) == pytest.approx(0.005, rel=1e-3)


class _Paced:
    """A generator whose steps take a time of their own, by a clock that it moves."""

    def __init__(self, meter: SpeedMeter, step_s: float, token_s: float) -> None:
        self.now, self.prompts = 0.0, list[int]()
        self._meter, self._step_s, self._token_s = meter, step_s, token_s
        self._unread: dict[str, int] = {}
        self._writing: set[str] = set()

    def add(self, request: GenerationRequest) -> None:
        self.prompts.append(len(request.prompt_ids))
        self._unread[request.request_id] = len(request.prompt_ids)

    def cancel(self, request_id: str) -> None:
        self._unread.pop(request_id, None)
        self._writing.discard(request_id)

    def probe(self) -> None:
        self._meter.note_idle(self._step_s)

    def step(self) -> list[TokenEvent]:
        pieces, num_written = [(0, count) for count in self._unread.values()], len(self._writing)
        seconds = sum(self._unread.values()) * self._token_s + num_written * self._step_s
        names = [*self._writing, *self._unread]
        self._writing |= set(self._unread)
        self._unread.clear()
        self.now += seconds
        self._meter.note(seconds, pieces, num_written)
        return [TokenEvent(name, 1, None) for name in names]


def test_measuring_finds_the_speed_and_keeps_to_its_time() -> None:
    meter = SpeedMeter()
    paced = _Paced(meter, step_s=0.01, token_s=0.001)
    measure_speed(
        paced,
        meter,
        max_sequences=4,
        max_context_tokens=2048,
        budget_s=2.0,
        clock=lambda: paced.now,
    )
    assert meter.speed is not None
    assert meter.speed.writing_s(4) == pytest.approx(0.04)
    assert meter.speed.reading_s(500) == pytest.approx(0.5)
    assert paced.now < 2.0 + 1.1 + 0.2  # a step of a prompt may end later, and what comes first


def test_even_a_slow_one_is_measured_once() -> None:
    meter = SpeedMeter()
    paced = _Paced(meter, step_s=10.0, token_s=5.0)
    measure_speed(
        paced, meter, max_sequences=4, max_context_tokens=64, budget_s=0.1, clock=lambda: paced.now
    )
    assert meter.speed == Speed(((1, 10.0),), ((64, 5.0),))
    assert max(paced.prompts) < 64


def test_a_real_generator_is_measured_and_left_empty() -> None:
    meter = SpeedMeter()
    generator = BatchGenerator(
        tiny_model(), max_concurrency=3, max_context_tokens=200, meter=meter, num_pages=12
    )
    ticks = itertools.count()
    with torch.inference_mode():
        measure_speed(
            generator,
            meter,
            max_sequences=3,
            max_context_tokens=200,
            budget_s=40,
            clock=lambda: next(ticks),
        )
    assert meter.speed is not None
    assert [number for number, _ in meter.speed.step_s] == [1, 3]
    assert all(seconds > 0 for _, seconds in (*meter.speed.step_s, *meter.speed.token_s))
    assert generator.num_running == generator.num_waiting == 0
