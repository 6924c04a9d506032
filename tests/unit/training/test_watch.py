import dataclasses
import logging

import pytest

from r1ray.training.step import StepRecord
from r1ray.training.watch import Posted, Recovery, Watch

RECORD = StepRecord(
    step=1,
    loss=1.0,
    learning_rate=1e-3,
    grad_norm=1.0,
    num_tokens=10,
    num_targets=5,
    was_skipped=False,
    precision="fp32",
    loss_scale=1.0,
    num_promoted=0,
    seconds=0.1,
    exchange_wait_s=0.0,
    sent_bytes=0,
    received_bytes=0,
    residual_norm=0.0,
    staleness_steps=0,
)


def _record(step: int) -> StepRecord:
    return dataclasses.replace(RECORD, step=step)


class Scene:
    """A watch with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[int] = []
        self.watch = Watch(lambda record: self.steps.append(record.step), clock=lambda: self.now)
        self.posted = Posted()

    def look(self, now: float) -> None:
        self.now = now
        self.watch.look(self.posted)

    def start(self, step: int) -> None:
        self.posted = self.posted.with_start(step)

    def post(self, step: int, plan: str | None = None) -> None:
        self.posted = self.posted.with_record(_record(step), plan)


def test_every_new_record_is_shown_once() -> None:
    scene = Scene()
    scene.start(0)
    scene.look(0)
    scene.post(1)
    scene.look(1)
    scene.look(2)
    scene.post(4)
    scene.look(3)
    assert scene.steps == [1, 4]
    assert scene.watch.recoveries == []


def test_a_restart_is_timed_from_the_last_step_to_the_next_and_counts_what_is_done_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    scene = Scene()
    scene.start(0)
    scene.post(13)
    scene.look(10)
    scene.start(10)
    scene.look(20)
    scene.look(21)
    scene.post(11)
    scene.look(25)
    scene.look(26)
    assert scene.watch.recoveries == [Recovery(seconds=15, lost_steps=3)]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "resuming after step 10",
        "recovered 15.0 s after step 13; 3 steps are done again",
    ]


def test_a_restart_and_its_first_step_within_one_look_are_noticed() -> None:
    scene = Scene()
    scene.start(0)
    scene.post(8)
    scene.look(1)
    scene.start(5)
    scene.post(6)
    scene.look(4)
    assert scene.watch.recoveries == [Recovery(seconds=3, lost_steps=3)]


def test_a_run_taken_up_by_a_new_driver_is_no_recovery(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    scene = Scene()
    scene.start(20)
    scene.look(0)
    scene.post(21)
    scene.look(5)
    assert scene.watch.recoveries == []
    assert [record.getMessage() for record in caplog.records] == ["resuming after step 20"]


def test_the_plan_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="r1ray")
    scene = Scene()
    scene.start(0)
    for step in (1, 2):
        scene.post(step, plan="because")
        scene.look(step)
    assert [record.getMessage() for record in caplog.records] == ["because"]
