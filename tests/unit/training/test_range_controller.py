import math
import random
from typing import Any

import pytest
import torch

from r1ray.training.precision_policy import GroupRange, PrecisionPolicy, StepRange
from r1ray.training.range_controller import RangeController
from tests.unit.training.policies import seen_range, update_policy

FP16 = torch.finfo(torch.float16)
LEAST = FP16.tiny * FP16.eps
NORMAL = (1.0, 1e-2)  # largest and smallest |g| of a group that fp16 holds at S = 1


def _controller(num_groups: int = 4, **changes: Any) -> RangeController:
    return RangeController([True] * num_groups, torch.float16, **{"raise_after": 5} | changes)


def _run(policy: PrecisionPolicy, *sizes: tuple[float, float], steps: int = 1) -> int:
    """Steps of groups whose |g| lies between `sizes`, as fp16 shows them; returns skipped ones.

    A group that overflows infects those before it; half of a group's elements are the smallest.
    """
    skips = 0
    for _ in range(steps):
        scale, groups = policy.loss_scale, []
        failed = max(
            (
                index
                for index, (largest, _) in enumerate(sizes)
                if largest * scale > FP16.max and index not in policy.promoted
            ),
            default=-1,
        )
        for index, (largest, smallest) in enumerate(sizes):
            is_wide = index in policy.promoted
            is_visible = is_wide or smallest * scale >= LEAST
            groups.append(
                seen_range(
                    math.inf if index <= failed else largest * scale,
                    nonfinite=float(index <= failed),
                    subnormal=0.5 * (is_visible and smallest * scale < FP16.tiny),
                    flushed=0.5 * (is_wide and smallest * scale < LEAST),
                )
            )
        skips += failed >= 0
        update_policy(policy, *groups)
    return skips


def test_gradients_that_fit_leave_everything_as_it_is() -> None:
    controller = _controller()
    assert _run(controller, *[NORMAL] * 4, steps=200) == 0
    assert controller.loss_scale == 1.0
    assert not controller.promoted
    assert controller.generation == 0


@pytest.mark.parametrize(
    ("jump", "skips", "promoted"), [(2.0**17, 1, []), (2.0**22, 2, [3]), (2.0**29, 3, [3])]
)
def test_an_overflow_costs_few_steps_and_ends_at_a_scale_that_fits(
    jump: float, skips: int, promoted: list[int]
) -> None:
    controller = _controller()
    _run(controller, *[NORMAL] * 4)
    assert _run(controller, *[(jump, jump / 100)] * 4, steps=8) == skips
    assert controller.loss_scale < 1
    assert 4 * jump * controller.loss_scale <= FP16.max < 64 * jump * controller.loss_scale
    assert controller.promoted == set(promoted)


def test_a_group_that_overflows_again_at_once_is_promoted_and_the_scale_recovers() -> None:
    controller = _controller()
    _run(controller, *[NORMAL] * 4)
    assert _run(controller, NORMAL, (2.0**40, 1.0), NORMAL, NORMAL, steps=6) == 2
    assert controller.promoted == {1}
    assert controller.loss_scale >= 1.0


def test_one_overflow_returns_to_half_the_scale_that_caused_it() -> None:
    controller = _controller()
    _run(controller, *[NORMAL] * 4)
    update_policy(controller, *[seen_range(math.inf, nonfinite=3)] * 4)
    assert controller.loss_scale == 2.0**-4
    _run(controller, *[NORMAL] * 4)
    assert controller.loss_scale == 0.5


def test_a_growing_gradient_lowers_the_scale_before_it_overflows() -> None:
    controller, largest = _controller(), 1.0
    while largest < 1e9:
        assert _run(controller, *[(largest, largest / 100)] * 4) == 0
        largest *= 1.2
    assert controller.loss_scale < 2.0**-13


def test_underflow_raises_the_scale_only_when_it_lasts() -> None:
    controller = _controller(raise_after=50)
    short, good = seen_range(subnormal=0.0101), seen_range(subnormal=0.0099)
    for _ in range(3):
        for _ in range(49):
            update_policy(controller, short, *[good] * 3)
        update_policy(controller, *[good] * 4)
    assert controller.loss_scale == 1.0
    for _ in range(50):
        assert controller.loss_scale == 1.0
        update_policy(controller, short, *[good] * 3)
    assert controller.loss_scale == 2.0**13  # which leaves the logits 4x headroom
    for _ in range(100):
        update_policy(controller, *[good] * 4)
    assert controller.loss_scale == 2.0**13
    assert not controller.promoted


@pytest.mark.parametrize(
    ("seen", "num_steps"),
    [
        (seen_range(subnormal=0.02), 25),
        (seen_range(subnormal=0.1), 5),
        (seen_range(subnormal=0.9), 4),  # one step is no evidence
        (seen_range(0.0), 4),  # nothing is left to be counted
        (seen_range(1e-6), 4),
    ],
)
def test_the_more_underflow_the_sooner_the_scale_rises(seen: GroupRange, num_steps: int) -> None:
    controller = _controller(raise_after=50)
    for _ in range(num_steps):
        assert controller.loss_scale == 1.0
        update_policy(controller, seen, *[seen_range()] * 3)
    assert controller.loss_scale > 1.0


def test_the_scale_never_rises_beyond_four_times_headroom() -> None:
    controller = _controller(raise_after=2)
    sizes = [(100.0, 1e-9), *[(100.0, 1.0)] * 3]
    for _ in range(60):
        assert _run(controller, *sizes) == 0
        if not controller.promoted:
            assert 4 * 100 * controller.loss_scale <= FP16.max


def test_a_group_wider_than_the_dtype_is_promoted_alone() -> None:
    controller = _controller()
    sizes = [NORMAL, (1e5, 1e-5), NORMAL, NORMAL]
    skips = _run(controller, *sizes, steps=100)
    assert controller.promoted == {1}
    assert skips <= 2
    assert _run(controller, *sizes, steps=200) == 0
    assert controller.promoted == {1}


def test_a_large_group_that_starves_the_others_is_promoted_and_the_scale_recovers() -> None:
    controller = _controller()
    large = (2.0**26, 2.0**20)
    sizes = [NORMAL, NORMAL, large, NORMAL]
    _run(controller, *[NORMAL] * 4)
    _run(controller, *sizes, steps=60)
    assert controller.promoted == {2}
    assert controller.loss_scale * NORMAL[1] >= FP16.tiny


def test_a_small_group_among_large_ones_is_promoted_itself() -> None:
    controller = _controller()
    large = (1e4, 1e2)
    _run(controller, large, large, (1e-6, 1e-9), large, steps=60)
    assert controller.promoted == {2}


def test_a_promoted_group_goes_back_after_clean_steps_in_a_row() -> None:
    controller = _controller(demote_after=20)
    wide = [NORMAL, (1e5, 1e-5), NORMAL, NORMAL]
    _run(controller, *wide, steps=30)
    assert controller.promoted == {1}
    for _ in range(3):
        _run(controller, *[NORMAL] * 4, steps=19)
        _run(controller, *wide)  # what would not have fitted counts from the beginning
    assert controller.promoted == {1}
    _run(controller, *[NORMAL] * 4, steps=19)
    assert controller.promoted == {1}
    _run(controller, *[NORMAL] * 4)
    assert not controller.promoted


@pytest.mark.parametrize(
    "unclean",
    [seen_range(amax=2e4), seen_range(subnormal=0.02), seen_range(subnormal=0.009, flushed=0.005)],
)
def test_a_gradient_that_would_not_have_fitted_keeps_a_group_promoted(unclean: GroupRange) -> None:
    controller = _controller(num_groups=2, demote_after=3)
    controller.promoted = frozenset({1})
    for _ in range(20):
        update_policy(controller, seen_range(), unclean)
    assert controller.promoted == {1}
    for _ in range(3):
        update_policy(controller, seen_range(), seen_range())
    assert not controller.promoted


def test_one_poisoned_forward_changes_nothing() -> None:
    controller = _controller()
    _run(controller, *[NORMAL] * 4)
    broken = seen_range(math.inf, nonfinite=9)
    update_policy(controller, broken, seen_range(math.inf, nonfinite=9, fault=1), broken, broken)
    assert controller.loss_scale == 1.0
    assert not controller.promoted
    assert controller.strikes == 1
    _run(controller, *[NORMAL] * 4)
    assert controller.strikes == 0


def _forward_fault(controller: RangeController, index: int, num_groups: int = 4) -> None:
    """The output of `index` is not finite, and all that follows from it."""
    groups = [
        seen_range(math.inf, nonfinite=9, fault=float(group >= index))
        for group in range(num_groups)
    ]
    update_policy(controller, *groups)


def test_a_group_whose_forward_fails_again_is_promoted_and_the_scale_kept() -> None:
    controller = _controller(demote_after=20)
    _forward_fault(controller, 2)
    _run(controller, *[NORMAL] * 4, steps=19)
    _forward_fault(controller, 2)
    assert controller.promoted == {2}
    assert controller.loss_scale == 1.0


def test_a_forward_fault_is_forgotten_in_time() -> None:
    controller = _controller(demote_after=20)
    _forward_fault(controller, 2)
    _run(controller, *[NORMAL] * 4, steps=20)
    _forward_fault(controller, 2)
    assert not controller.promoted


def test_a_demoted_group_whose_forward_fails_again_is_promoted_at_once() -> None:
    controller = _controller(demote_after=20)
    for _ in range(2):
        _forward_fault(controller, 2)
    _run(controller, *[NORMAL] * 4, steps=20)
    assert not controller.promoted
    _forward_fault(controller, 2)
    assert controller.promoted == {2}


def test_forward_faults_that_move_on_are_no_strikes_but_one_that_stays_is() -> None:
    controller = _controller()
    for index in (0, 1, 3):
        for _ in range(2):
            _forward_fault(controller, index)
            assert controller.strikes <= 2
    assert controller.promoted == {0, 1, 3}
    _forward_fault(controller, 3)
    assert controller.strikes == 3


def test_what_stays_not_finite_however_far_the_scale_falls_ends_in_three_strikes() -> None:
    controller = _controller()
    for strikes in (1, 2, 3):
        update_policy(
            controller, seen_range(), seen_range(math.inf, nonfinite=1), seen_range(), seen_range()
        )
        assert controller.strikes == strikes
    assert controller.loss_scale == 2.0**-20
    assert controller.promoted == {1}


def test_the_fault_is_the_first_in_the_forward_or_else_the_first_in_the_backward() -> None:
    good, bad, source = seen_range(), seen_range(nonfinite=1), seen_range(nonfinite=1, fault=1)
    assert StepRange(False, (bad, source, source, bad)).find_fault() == (1, True)
    assert StepRange(False, (bad, bad, bad, good)).find_fault() == (2, False)
    assert StepRange(False, (good, good)).find_fault() is None


def test_an_overflow_bounds_the_scale_for_a_while() -> None:
    controller = _controller(demote_after=50)
    small = (1e-3, 1e-6)
    _run(controller, *[NORMAL] * 4)
    update_policy(
        controller, *[seen_range(math.inf, nonfinite=1)] * 3, seen_range()
    )  # group 2 did it
    _run(controller, *[small] * 4, steps=3)
    assert controller.loss_scale == 0.5
    _run(controller, *[small] * 4)
    assert controller.promoted == {2}  # it held S down, and most groups starved
    assert controller.loss_scale > 1.0  # with it, the bound is gone


def test_the_bound_of_an_overflow_ends() -> None:
    controller = _controller(demote_after=30)
    update_policy(
        controller, seen_range(), seen_range(), seen_range(), seen_range(math.inf, nonfinite=1)
    )
    _run(controller, *[NORMAL] * 4, steps=29)
    assert controller.loss_scale == 0.5
    _run(controller, *[(1e-3, 1e-6)] * 4, steps=5)
    assert controller.loss_scale > 1.0
    assert not controller.promoted


def test_a_group_that_is_only_looked_up_is_left_alone() -> None:
    controller = RangeController([False, True, True], torch.float16, raise_after=5)
    for _ in range(20):
        update_policy(controller, seen_range(1e30, subnormal=0.9), seen_range(), seen_range())
    assert controller.loss_scale == 1.0
    assert not controller.promoted


def test_bfloat16_goes_back_to_no_scale_after_overflows() -> None:
    controller = RangeController([True] * 4, torch.bfloat16)
    for _ in range(2):
        update_policy(controller, *[seen_range(math.inf, nonfinite=3)] * 4)
    assert controller.loss_scale < 1.0

    for _ in range(6):
        update_policy(controller, *[seen_range(1.0)] * 4)

    assert controller.loss_scale == 1.0


def test_bfloat16_needs_no_scale_where_fp16_does() -> None:
    controller = RangeController([True] * 2, torch.bfloat16, raise_after=5)
    for amax in (0.0, 1e-20, 1.0, 1e30):
        for _ in range(20):
            update_policy(controller, seen_range(amax), seen_range(amax))
    assert controller.loss_scale == 1.0
    assert not controller.promoted


def test_a_step_computed_before_the_last_decision_is_not_judged() -> None:
    controller = _controller()
    overflow = [seen_range(math.inf, nonfinite=1)] * 4
    update_policy(controller, *overflow)
    assert controller.loss_scale == 2.0**-4
    update_policy(controller, *overflow, generation=0)  # it was under way when S fell
    assert controller.loss_scale == 2.0**-4
    assert controller.strikes == 1


def _random_steps(seed: int, count: int) -> list[list[tuple[float, float]]]:
    """Groups that drift and jump over twelve orders of magnitude."""
    rng = random.Random(seed)
    levels, steps = [0.0] * 4, []
    for _ in range(count):
        levels = [
            rng.uniform(-6, 6) if rng.random() < 0.01 else level + rng.gauss(0, 0.1)
            for level in levels
        ]
        steps.append([(10**level, 10 ** (level - 3)) for level in levels])
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_training_never_stalls_and_the_scale_is_always_a_power_of_two(seed: int) -> None:
    controller = _controller(demote_after=50)
    skips = 0
    for sizes in _random_steps(seed, 1000):
        skips += _run(controller, *sizes)
        assert math.frexp(controller.loss_scale)[0] == 0.5
        assert controller.strikes < 3
    assert skips < 100


@pytest.mark.parametrize("seed", range(3))
def test_a_restored_controller_decides_as_the_one_that_went_on(seed: int) -> None:
    steps = _random_steps(seed, 600)
    straight = _controller(demote_after=50)
    for sizes in steps[:300]:
        _run(straight, *sizes)
    resumed = _controller(demote_after=50)
    resumed.load_state_dict(straight.state_dict())
    for sizes in steps[300:]:
        _run(straight, *sizes)
        _run(resumed, *sizes)
        assert resumed.loss_scale == straight.loss_scale
        assert resumed.promoted == straight.promoted
    assert resumed.state_dict() == straight.state_dict()
