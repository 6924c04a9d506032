"""The streaming schedule: even use of the link, and versions that can be told from the step."""

import itertools

import pytest

from r1ray.exchange.stream_schedule import StreamSchedule


def _schedule(**changes: int) -> StreamSchedule:
    values = {"num_steps": 500, "num_fragments": 4, "local_steps": 100, "overlap_steps": 5}
    return StreamSchedule(**{**values, **changes})


def test_each_fragment_is_sent_every_local_steps_and_the_fragments_in_turn() -> None:
    schedule = _schedule()
    sent = [(step, *pair) for step in range(1, 500) for pair in schedule.sends(step)]
    assert sent[:5] == [(25, 0, 0), (50, 1, 0), (75, 2, 0), (100, 3, 0), (125, 0, 1)]
    steps = [step for step, _, _ in sent]
    assert {after - before for before, after in itertools.pairwise(steps)} == {25}


@pytest.mark.parametrize(
    "schedule",
    [
        _schedule(),
        _schedule(num_steps=495),
        _schedule(num_steps=496),
        _schedule(num_steps=3),
        _schedule(num_fragments=7, local_steps=9, overlap_steps=0, num_steps=100),
        _schedule(num_fragments=4, local_steps=2, overlap_steps=1, num_steps=21),
    ],
)
def test_versions_count_up_and_are_known_from_the_step(schedule: StreamSchedule) -> None:
    expected = [0] * schedule.num_fragments
    for step in range(1, schedule.num_steps):
        for fragment, version in schedule.sends(step):
            assert version == expected[fragment]
            assert schedule.sent_at(fragment, version) == step
            assert step + schedule.overlap_steps < schedule.num_steps
            expected[fragment] += 1
        for fragment, version in enumerate(expected):
            assert schedule.next_version(fragment, step) == version
    for fragment, version in enumerate(expected):
        assert schedule.final_version(fragment) == version
        assert schedule.sent_at(fragment, version) == schedule.num_steps
        assert schedule.next_version(fragment, schedule.num_steps) == version + 1


def test_outer_momentum_falls_to_nothing_at_the_end() -> None:
    schedule = _schedule()
    assert [schedule.momentum_share(3, version) for version in range(3)] == [1.0] * 3
    assert schedule.momentum_share(2, 4) == pytest.approx(0.25)  # step 475 of 500
    assert schedule.momentum_share(2, schedule.final_version(2)) == 0.0
