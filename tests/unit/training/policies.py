"""What precision policies are told of a step."""

from typing import Any

from r1ray.training.precision_policy import GroupRange, PrecisionPolicy, StepRange

__all__ = ["seen_range", "update_policy"]


def seen_range(
    amax: float = 1.0,
    *,
    nonfinite: float = 0.0,
    subnormal: float = 0.0,
    flushed: float = 0.0,
    fault: float = 0.0,
) -> GroupRange:
    return GroupRange(amax, nonfinite, subnormal, flushed, fault)


def update_policy(policy: PrecisionPolicy, *groups: GroupRange, **changes: Any) -> None:
    is_finite = not any(group.num_nonfinite or group.forward_fault for group in groups)
    step = {"is_finite": is_finite, "groups": groups, "generation": policy.generation}
    policy.update(StepRange(**{**step, **changes}))
