import math

from r1ray.training.precision_policy import PrecisionPolicy, StepRange, ThresholdPolicy
from tests.unit.training.policies import seen_range, update_policy


def test_the_threshold_looks_at_the_gradient_of_the_mean_loss() -> None:
    policy = ThresholdPolicy([False, True, True, True])
    update_policy(
        policy,
        seen_range(1e9),
        seen_range(59),
        seen_range(61),
        seen_range(1.0),
        targets_per_worker=10.0,
    )
    assert policy.promoted == {2}
    assert policy.loss_scale == 1.0
    update_policy(policy, *[seen_range()] * 4, targets_per_worker=10.0)
    assert not policy.promoted


def test_the_threshold_takes_what_is_not_finite_for_large_and_gives_up_after_three() -> None:
    policy = ThresholdPolicy([True, True])
    for strikes in (1, 2, 3):
        update_policy(policy, seen_range(math.inf, nonfinite=1), seen_range(1.0))
        assert policy.promoted == {0}
        assert policy.strikes == strikes


def test_policy_none_only_counts() -> None:
    policy = PrecisionPolicy()
    for strikes in (1, 2):
        policy.update(StepRange(is_finite=False))
        assert policy.strikes == strikes
    policy.update(StepRange(is_finite=True))
    assert policy.strikes == 0
    assert policy.loss_scale == 1.0
    assert not policy.promoted
