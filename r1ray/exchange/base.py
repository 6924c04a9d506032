"""The seam between a training step and whatever carries gradients between workers.

A step computes gradients of the *summed* loss into `.grad`, then
1. `on_grads_ready(totals)` hands them over; the exchange may work in the background from here;
2. `before_step()` says what the optimizer does: `apply` the gradient now in `.grad`, `skip` this
   step on every worker (a non-finite value somewhere), or `wait` (nothing has arrived yet).
The verdict is the same on every worker, and so are the weights afterwards.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from r1ray.exchange.transport import Transport

__all__ = ["Exchange", "ExchangeStats", "StepTotals", "Verdict"]

Verdict = Literal["apply", "skip", "wait"]


@dataclass(frozen=True)
class StepTotals:
    """Sums over a step's micro-batches: of one worker before, of all workers after the exchange."""

    loss_sum: float
    num_targets: int
    num_tokens: int


@dataclass(frozen=True)
class ExchangeStats:
    """Since `setup`: payload bytes this worker handed to the transport, and seconds it waited."""

    payload_bytes: int
    wait_s: float


class Exchange(ABC):
    """Brings the workers' gradients together. One instance per worker; not thread-safe."""

    @abstractmethod
    def setup(self, parameters: Sequence[nn.Parameter], transport: Transport) -> None:
        """Bind to the distinct trainable parameters, in the same order on every worker."""

    @abstractmethod
    def on_grads_ready(self, totals: StepTotals) -> None:
        """Take over the gradients in `.grad`; called once a step, after the last micro-batch."""

    @abstractmethod
    def before_step(self) -> tuple[Verdict, StepTotals]:
        """The verdict and the totals over all workers; with `apply`, `.grad` is the mean gradient
        per target token.

        Raises:
            ExchangeError: a worker cannot be reached, or no worker had a target token.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What this worker must keep to resume; plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], *, world_size_changed: bool) -> None:
        """Continue from `state_dict`; per-worker state may be void when the world size changed."""

    @abstractmethod
    def stats(self) -> ExchangeStats: ...
