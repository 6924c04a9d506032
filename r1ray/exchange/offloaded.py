"""`dense` with gradients and optimizer state on a slow tier: memory-mapped files.

1. A gradient is added to its file, piece by piece, as soon as autograd has made it, and freed.
2. A step sums gradients over the workers, piece by piece, and adds up their norm.
3. It then clips and updates, piece by piece again: weights, gradients and both moments of one piece
   are resident at a time.

Price: of memory, four pieces of 4 MiB beside the one gradient that autograd is at; of time, 28
bytes a parameter read or written a step, in the page cache or on the disk. Between workers, that of
`dense`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r1ray.errors import ConfigError, ExchangeError
from r1ray.exchange.base import Exchange, ExchangeStats, StepOutcome, StepTotals
from r1ray.exchange.transport import Transport
from r1ray.exchange.update_rule import UpdateRule
from r1ray.models.mapped import MappedTensors
from r1ray.models.tiered import TieredModel

__all__ = ["OffloadedExchange"]

_PIECE = 1 << 20  # elements
_EPSILON = 1e-8  # AdamW's


class OffloadedExchange(Exchange):
    """All-reduce in fp32; keeps next to nothing in memory.

    Args:
        tiered: the model that is trained; its parameters are views of its files.
        directory: for files of gradients and moments; None for the system's temporary directory.
    """

    copies_state = True

    def __init__(self, tiered: TieredModel, directory: str | Path | None) -> None:
        self._tiered = tiered
        self._directory = directory
        self._wait_s = 0.0

    def setup(
        self, parameters: Sequence[nn.Parameter], transport: Transport, rule: UpdateRule
    ) -> None:
        self._transport, self._rule = transport, rule
        by_address = {file[name].data_ptr(): name for name, file in self._tiered.files.items()}
        self._parameters = {by_address[item.data_ptr()]: item for item in parameters}
        self._gradients, self._means, self._squares = (
            MappedTensors.create(self._directory, self._parameters) for _ in range(3)
        )
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(self._take_over(name))

    def step(self, totals: StepTotals) -> StepOutcome:
        joint = self._sum_totals(totals)
        square_sum = 0.0
        for name, piece in self._pieces():
            gradient = self._gradients[name].view(-1)[piece]
            if self._transport.world_size > 1:
                started = time.perf_counter()
                self._transport.all_reduce_sum(gradient).wait()
                self._wait_s += time.perf_counter() - started
            gradient.div_(joint.num_targets)
            square_sum += float(gradient.square().sum(dtype=torch.float64))
            self._gradients.release(name, piece.start, piece.stop)
        grad_norm = math.sqrt(square_sum)
        # Sums are bit-identical on all workers, so every worker reaches the same verdict.
        is_finite = math.isfinite(grad_norm)
        learning_rate = self._rule.learning_rate_at(self.num_updates)
        factor = self._rule.clip_factor(grad_norm) if is_finite else 0.0
        self.num_updates += is_finite
        for name, piece in self._pieces():
            gradient = self._gradients[name].view(-1)[piece]
            if is_finite:
                self._update(name, piece, gradient * factor, learning_rate)
            gradient.zero_()
            for file in (
                self._tiered.files[name],
                self._gradients,
                self._means,
                self._squares,
            ):
                file.release(name, piece.start, piece.stop)
        if not is_finite:
            return StepOutcome("skip", joint)
        return StepOutcome("apply", joint, learning_rate, grad_norm)

    def state_dict(self) -> dict[str, Any]:
        if self._transport.rank != 0:
            return {}
        return {
            "num_updates": self.num_updates,
            "means": dict(self._means),
            "squares": dict(self._squares),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        if "means" not in states[0]:
            raise ConfigError(
                "the checkpoint of this run was saved without train.resources.tiers; leave them "
                "out, or change run.name to begin anew"
            )
        self.num_updates = states[0]["num_updates"]
        for kind, file in (("means", self._means), ("squares", self._squares)):
            for name, stored in states[0][kind].items():
                file[name].copy_(stored)
                file.release(name)

    def stats(self) -> ExchangeStats:
        return ExchangeStats(
            self._transport.sent_bytes, self._transport.received_bytes, self._wait_s
        )

    def files(self) -> set[MappedTensors]:
        """Those of weights, gradients and moments."""
        return {*self._tiered.files.values(), self._gradients, self._means, self._squares}

    def release_memory(self) -> None:
        for file in self.files():
            for name in file:
                file.release(name)

    def close(self) -> None:
        return None  # files without a name go with the process

    def _take_over(self, name: str) -> Any:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None, "autograd has just made it"
            made, kept = parameter.grad.flatten(), self._gradients[name].view(-1)
            self._tiered.budget.check()
            for piece in _cut(len(made)):
                kept[piece].add_(made[piece])
                self._gradients.release(name, piece.start, piece.stop)
            parameter.grad = None

        return take

    def _pieces(self) -> Iterator[tuple[str, slice]]:
        for name, parameter in self._parameters.items():
            for piece in _cut(parameter.numel()):
                yield name, piece

    @torch.no_grad()
    def _update(self, name: str, piece: slice, gradient: Tensor, learning_rate: float) -> None:
        """AdamW on a piece, as torch.optim.AdamW has it."""
        weight, mean, square = (
            file[name].view(-1)[piece]
            for file in (self._tiered.files[name], self._means, self._squares)
        )
        beta1, beta2 = self._rule.betas
        if self._parameters[name].dim() >= 2:
            weight.mul_(1 - learning_rate * self._rule.weight_decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        unbiased = square.sqrt().div_(math.sqrt(1 - beta2**self.num_updates)).add_(_EPSILON)
        weight.addcdiv_(mean, unbiased, value=-learning_rate / (1 - beta1**self.num_updates))

    def _sum_totals(self, totals: StepTotals) -> StepTotals:
        values = torch.tensor(
            [totals.loss_sum, totals.num_targets, totals.num_tokens], dtype=torch.float64
        )
        started = time.perf_counter()
        self._transport.all_reduce_sum(values).wait()
        self._wait_s += time.perf_counter() - started
        loss_sum, num_targets, num_tokens = values.tolist()
        if num_targets < 1:
            raise ExchangeError("no worker had a target token in this step; check the BatchSet")
        return StepTotals(loss_sum, int(num_targets), int(num_tokens))


def _cut(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _PIECE):
        yield slice(start, min(start + _PIECE, numel))
