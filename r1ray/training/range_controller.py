"""Dynamic mixed precision by the range of the gradients: a loss scale, and float32 where none fits.

For a low precision of largest number M, loss scale S and each tensor group's largest gradient amax:
1. *Overflow*: the step is skipped and S falls by 2^4; if the same group overflows again at once, by
   2^8, and the group is promoted to float32. The next finite step shows how large the gradients are
   and brings S to what fits, below an S that overflowed; that bound ends with the promotion of the
   group that overflowed, or after `demote_after` finite steps.
2. *Pre-emptive*: S falls as soon as EMA(amax)·S·4 > M, before anything overflows.
3. *Underflow*: in some group more than 1% of the nonzero gradient has been below the dtype's normal
   numbers for `raise_after` steps, or x% for an x-th of them, but for four at least: S rises as far
   as 4x headroom allows.
4. *Both at once*: underflow without headroom. The range is wider than the dtype's, and a group is
   promoted: the one that holds S down if it starves itself or most groups starve, else those that
   starve.
5. *Forward*: S does not act on the forward. A group whose own output is not finite is under
   suspicion, and promoted when that happens again within `demote_after` steps of low precision: one
   poisoned batch is only skipped, activations outside of the dtype's range get the wider one.
6. A promoted group goes back after `demote_after` steps in a row whose gradient would have fitted.
7. Three failures in a row that come from the same group, whatever was done, are not overflow:
   `strikes` says so, and training stops.

S is a power of two and may be below 1. It starts at 1: the loss is a sum over target tokens, so
that equals their number for a mean. It never exceeds M/4, because the gradient of a logit is up to
1 a target.

What can be seen: a weight gradient that was computed in low precision arrives with its flushed
elements already zero, so elements that were lost cannot be counted there. The *subnormal* share,
elements still there with fewer bits, is the early sign that rule 3 goes by, and a group without any
normal number counts as all subnormal. In a promoted group the true range is visible: there, rule 6
counts what would be flushed. Gradients of activations are seen only through the weight gradients
that are sums of them.

Price: some arithmetic per group and step; no tensor is read here.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from r1ray.training.precision_policy import GroupRange, PrecisionPolicy, StepRange

__all__ = ["RangeController"]

HEADROOM = 4.0
UNDERFLOW_SHARE = 0.01
FLUSHED_SHARE = UNDERFLOW_SHARE / 10  # ten times what evenly spread small numbers would show
EMA_DECAY = 0.9
FIRST_DROP, NEXT_DROP = 2.0**4, 2.0**8
MIN_STARVING_STEPS = 4


@dataclass
class _Group:
    """What the controller remembers of a group.

    Attributes:
        amax: moving average of the largest |g|, unscaled.
        starving: steps in a row with too many subnormal elements, in low precision, each counted as
            often as they exceed what is tolerated.
        clean_steps: in a row, whose gradient would have fitted, while promoted.
        suspect_steps: until an earlier forward fault is forgotten; finite ones, in low precision.
    """

    amax: float = 0.0
    starving: float = 0.0
    clean_steps: int = 0
    suspect_steps: int = 0


class RangeController(PrecisionPolicy):
    """The rules above.

    Args:
        has_products: for each group, whether anything in it runs in low precision at all; the
            others (an embedding, which is only looked up) are neither scaled for nor promoted.
        dtype: the low precision.
        raise_after: steps of underflow before S is raised or a group is promoted.
        demote_after: clean steps before a promoted group goes back.
    """

    is_watching = True

    def __init__(
        self,
        has_products: Sequence[bool],
        dtype: torch.dtype,
        *,
        raise_after: int = 50,
        demote_after: int = 1000,
    ) -> None:
        super().__init__()
        self._has_products = tuple(has_products)
        info, wide = torch.finfo(dtype), torch.finfo(torch.float32)
        self._max = info.max
        self._tiny = info.tiny if info.tiny > wide.tiny else 0.0  # with the range of float32, none
        self._raise_after, self._demote_after = raise_after, demote_after
        self._groups = [_Group() for _ in self._has_products]
        self._fault: int | None = None  # group of the last failure
        self._is_searching = False  # S was dropped blindly
        self._overflow: tuple[float, int] | None = None  # S that overflowed, and in which group
        self._overflow_age = 0

    def _decide(self, step: StepRange) -> None:
        if not step.is_finite:
            self._recover(step)
            return
        self.strikes = 0
        self._observe(step)
        ceiling = self._ceiling()
        if self._is_searching or ceiling < self.loss_scale:
            self.loss_scale = ceiling
        self._is_searching = False
        self._feed()
        self._demote()

    def _recover(self, step: StepRange) -> None:
        index, is_forward = step.find_fault() or (None, False)
        self.strikes = self.strikes + 1 if index in (self._fault, None) else 1
        self._fault = index
        if index is None:
            return
        if is_forward:
            group = self._groups[index]
            if group.suspect_steps and index in self._low():
                self._promote([index])
            group.suspect_steps = self._demote_after
        else:
            self._overflow, self._overflow_age = (self.loss_scale, index), 0
            self.loss_scale /= NEXT_DROP if self._is_searching else FIRST_DROP
            self._is_searching = True
            if self.strikes > 1 and index in self._low():
                self._promote([index])

    def _observe(self, step: StepRange) -> None:
        for index, (group, seen) in enumerate(zip(self._groups, step.groups, strict=True)):
            amax = seen.amax / self.loss_scale
            mean = EMA_DECAY * group.amax + (1 - EMA_DECAY) * amax if group.amax else amax
            group.amax = max(group.amax, amax) if self._is_searching else mean
            if index in self.promoted:
                group.clean_steps = group.clean_steps + 1 if self._would_fit(seen) else 0
            else:
                share = 1.0 if seen.amax < self._tiny else seen.subnormal_share
                weight = min(share / UNDERFLOW_SHARE, self._raise_after / MIN_STARVING_STEPS)
                group.starving = group.starving + weight if share > UNDERFLOW_SHARE else 0.0
                group.suspect_steps = max(0, group.suspect_steps - 1)
        self._overflow_age += 1
        if self._overflow_age >= self._demote_after:
            self._overflow = None

    def _would_fit(self, seen: GroupRange) -> bool:
        return (
            seen.amax * HEADROOM <= self._max
            and seen.subnormal_share <= UNDERFLOW_SHARE
            and seen.flushed_share <= FLUSHED_SHARE
        )

    def _feed(self) -> None:
        """Answer underflow by a higher S, or by promotion where there is no headroom for it."""
        low = self._low()
        starving = [i for i in low if self._groups[i].starving >= self._raise_after]
        if not starving:
            return
        if self._ceiling() < 2 * self.loss_scale:
            blocker = self._blocker()
            is_blocked = blocker in starving or 2 * len(starving) > len(low)
            self._promote([blocker] if is_blocked and blocker is not None else starving)
        self.loss_scale = self._ceiling()
        for group in self._groups:
            group.starving = 0.0

    def _blocker(self) -> int | None:
        """The group that keeps S from rising; None where the gradient of the logits does."""
        low = self._low()
        if self._overflow is not None and self._overflow[0] / 2 <= self._fitting_scale():
            return self._overflow[1] if self._overflow[1] in low else None
        largest = max(low, key=lambda index: self._groups[index].amax)
        return largest if self._groups[largest].amax > 1.0 else None

    def _promote(self, indices: list[int]) -> None:
        self.promoted |= set(indices)
        if self._overflow is not None and self._overflow[1] in self.promoted:
            self._overflow = None
        for index in indices:
            self._groups[index].clean_steps = 0

    def _demote(self) -> None:
        self.promoted -= {
            index
            for index in self.promoted
            if self._groups[index].clean_steps >= self._demote_after
        }

    def _low(self) -> list[int]:
        return [
            index
            for index, has_products in enumerate(self._has_products)
            if has_products and index not in self.promoted
        ]

    def _fitting_scale(self) -> float:
        """The largest S that leaves the groups in low precision their headroom."""
        largest = max([1.0, *(self._groups[index].amax for index in self._low())])
        scale = 2.0 ** math.floor(math.log2(self._max / (HEADROOM * largest)))
        return scale if self._tiny else min(1.0, scale)  # nothing to lift out of underflow

    def _ceiling(self) -> float:
        bound = math.inf if self._overflow is None else self._overflow[0] / 2
        return min(self._fitting_scale(), bound)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "fault": self._fault,
            "is_searching": self._is_searching,
            "overflow": self._overflow,
            "overflow_age": self._overflow_age,
            "groups": [dataclasses.astuple(group) for group in self._groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._fault = state["fault"]
        self._is_searching = state["is_searching"]
        self._overflow = state["overflow"]
        self._overflow_age = state["overflow_age"]
        self._groups = [_Group(*values) for values in state["groups"]]
