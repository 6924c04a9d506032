"""The seam between a training step and whatever brings the workers together.

A step computes gradients of the *summed* loss into `.grad`; `step(totals)` turns them into updated
weights. The exchange owns the optimizer, because the strategies differ in where it runs: on every
worker, on the owner of a shard, or locally between merges. The verdict is the same on every worker:
`apply` (an update was made), `skip` (a non-finite value somewhere: nothing changed), or `wait`
(nothing has arrived yet).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from r1ray.exchange.transport import Transport
from r1ray.exchange.update_rule import UpdateRule

__all__ = ["Exchange", "ExchangeStats", "StepOutcome", "StepTotals", "Verdict"]

Verdict = Literal["apply", "skip", "wait"]


@dataclass(frozen=True)
class StepTotals:
    """Sums over a step's micro-batches: of one worker before, of all workers after the exchange.

    Attributes:
        peaks: what the workers agree on by the greatest value, in place of the sum.
    """

    loss_sum: float = 0.0
    num_targets: int = 0
    num_tokens: int = 0
    peaks: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepOutcome:
    """What the update that finished in a call did.

    Attributes:
        totals: of the step whose gradient this was; zeros with `wait`.
        grad_norm: before clipping; None unless applied.
    """

    verdict: Verdict
    totals: StepTotals = field(default_factory=StepTotals)
    learning_rate: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True)
class ExchangeStats:
    """Since `setup`, of this worker.

    Attributes:
        sent_bytes, received_bytes: payload, as the transport's algorithm moves it.
        wait_s: time the training thread waited for the exchange: for the network, for others, and
            for what is encoded and decoded in the meantime.
        residual_norm: of the error feedback kept for later steps, as last known.
        staleness_steps: age of the gradient in the last update.
    """

    sent_bytes: int
    received_bytes: int
    wait_s: float
    residual_norm: float = 0.0
    staleness_steps: int = 0


class Exchange(ABC):
    """One instance per worker; not thread-safe.

    Attributes:
        num_updates: updates applied: the clock of the learning rate.
        plan: why this exchange was chosen, where one was.
        is_local: whether the next step's outcome is of this worker alone: totals and verdict too.
        copies_state: whether `load_state_dict` copies what it is given, which may then be views of
            the checkpoint's files.
    """

    num_updates: int = 0
    plan: str | None = None
    is_local: bool = False
    copies_state: bool = False

    @abstractmethod
    def setup(
        self, parameters: Sequence[nn.Parameter], transport: Transport, rule: UpdateRule
    ) -> None:
        """Bind to the distinct trainable parameters, in the same order on every worker."""

    @abstractmethod
    def step(self, totals: StepTotals) -> StepOutcome:
        """Take the gradients in `.grad`, and update the weights; the caller clears them afterwards.

        Raises:
            ExchangeError: a worker cannot be reached, or no worker had a target token.
        """

    def flush(self) -> StepOutcome:
        """Finish what is under way, before a checkpoint and at the end; `wait` if nothing is.

        The caller clears the gradients afterwards.
        """
        return StepOutcome("wait")

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This worker's part of the state, after `flush`: plain values and tensors.

        Empty where rank 0's part says all.
        """

    @abstractmethod
    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the parts of *all* workers of the saved run, in rank order.

        Their number may differ from the number of workers now. Weights are loaded before.
        """

    def release_memory(self) -> None:
        """Give back what saving or loading a checkpoint has brought into memory; often nothing."""
        return

    @abstractmethod
    def stats(self) -> ExchangeStats: ...

    @abstractmethod
    def close(self) -> None:
        """End threads, process groups and connections; the weights stay."""
