"""The seam between what a step showed of its gradients and what the next one does about it.

The tensors of a model fall into groups (embedding, each layer, head). A policy sees, once a step,
what the measuring pass found in each group's gradient, and answers with a loss scale S and with the
groups that run in float32. It sees the greatest values over the workers: all decide alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_STRIKES", "GroupRange", "PrecisionPolicy", "StepRange", "ThresholdPolicy"]

MAX_STRIKES = 3
ARTICLE_THRESHOLD = 6.0


@dataclass(frozen=True)
class GroupRange:
    """What one step showed of one tensor group; the greatest value over the workers.

    Attributes:
        amax: largest |S·g|; inf where the gradient is not finite.
        num_nonfinite: elements of the gradient that are NaN or infinite.
        subnormal_share: of the nonzero elements, those below the dtype's smallest normal number.
        flushed_share: of the nonzero elements, those below its smallest subnormal number.
        forward_fault: 1.0 where an output of the group's forward was not finite, else 0.0.
    """

    amax: float
    num_nonfinite: float
    subnormal_share: float
    flushed_share: float
    forward_fault: float


@dataclass(frozen=True)
class StepRange:
    """What one step showed, agreed over the workers.

    Attributes:
        is_finite: the step was applied; else it was skipped.
        groups: in the order of the forward; empty where nothing was measured.
        generation: the policy's when the step was computed.
        targets_per_worker: target tokens that a worker's gradient is the sum over.
    """

    is_finite: bool
    groups: tuple[GroupRange, ...] = ()
    generation: int = 0
    targets_per_worker: float = 1.0

    def find_fault(self) -> tuple[int, bool] | None:
        """(group that a non-finite step came from, whether its forward failed); None if unknown.

        The first in the order of the forward, or else of the backward: the later ones caught it.
        """
        for index, group in enumerate(self.groups):
            if group.forward_fault:
                return index, True
        for index in reversed(range(len(self.groups))):
            if self.groups[index].num_nonfinite:
                return index, False
        return None


class PrecisionPolicy:
    """Policy `none`, and the base of the others: S stays 1 and no group is promoted.

    Attributes:
        is_watching: whether `update` needs the groups' ranges.
        loss_scale: S of the next step, a power of two.
        promoted: groups that run in float32.
        strikes: non-finite steps in a row that nothing helped against; stop at `MAX_STRIKES`.
        generation: changes with every answer that differs from the last. A step that was computed
            under an older one (an asynchronous exchange is one behind) is not judged.
    """

    is_watching = False

    def __init__(self) -> None:
        self.loss_scale = 1.0
        self.promoted: frozenset[int] = frozenset()
        self.strikes = 0
        self.generation = 0

    def update(self, step: StepRange) -> None:
        """Take in one finished step and decide on the next."""
        if self.is_watching and step.generation != self.generation:
            return
        before = self.loss_scale, self.promoted
        self._decide(step)
        self.generation += before != (self.loss_scale, self.promoted)

    def _decide(self, step: StepRange) -> None:
        self.strikes = 0 if step.is_finite else self.strikes + 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the same on every worker."""
        return {
            "loss_scale": self.loss_scale,
            "promoted": sorted(self.promoted),
            "strikes": self.strikes,
            "generation": self.generation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.loss_scale = state["loss_scale"]
        self.promoted = frozenset(state["promoted"])
        self.strikes = state["strikes"]
        self.generation = state["generation"]


class ThresholdPolicy(PrecisionPolicy):
    """The article's rule: a group whose largest |g| exceeds 6.0 runs in float32 in the next step.

    g is the gradient of the mean loss. S stays 1. A gradient that is not finite exceeds 6.0 too.

    Args:
        has_products: for each group, whether anything in it runs in low precision at all.
    """

    is_watching = True

    def __init__(self, has_products: Sequence[bool]) -> None:
        super().__init__()
        self._has_products = tuple(has_products)

    def _decide(self, step: StepRange) -> None:
        super()._decide(step)
        limit = ARTICLE_THRESHOLD * step.targets_per_worker
        groups = zip(self._has_products, step.groups, strict=True)
        self.promoted = frozenset(
            index for index, (is_low, seen) in enumerate(groups) if is_low and seen.amax > limit
        )
