"""The pace of steps against machines of known speed."""

from r1ray.models.pace import StepPace
from r1ray.ops.block_selection import BLOCK


def test_steps_take_what_they_may_after_a_few() -> None:
    pace = StepPace(0.08)
    assert pace.max_tokens == BLOCK  # until something is known
    for _ in range(10):
        pace.note(0.01, 0, is_writing=True)
    for _ in range(10):
        pace.note(0.01 + 1e-4 * pace.max_tokens, pace.max_tokens, is_writing=True)
    assert 0.075 < 0.01 + 1e-4 * pace.max_tokens <= 0.0801


def test_the_pace_follows_a_prompt_that_becomes_slower() -> None:
    pace = StepPace(0.08)
    for step in range(40):
        pace.note(1e-4 * (1 + step / 10) * pace.max_tokens, pace.max_tokens, is_writing=False)
    assert 1e-4 * 5 * pace.max_tokens < 0.085


def test_a_block_is_read_however_slow_the_machine_is() -> None:
    pace = StepPace(0.01)
    pace.note(5.0, 64, is_writing=True)
    assert pace.max_tokens == BLOCK
