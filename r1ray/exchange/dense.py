"""The reference exchange: every gradient element is summed over the workers, uncompressed.

1. Gradients are copied into flat buckets of about 32 MiB and all-reduced.
2. Three scalars (loss, target tokens, tokens) travel with them in float64.
3. The sum is divided by the global number of target tokens, clipped, and AdamW steps, on every
   worker alike.

Price: 2(N-1)/N · 4 bytes per parameter, step and worker in fp32, half in bf16, all waited for.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r1ray.errors import ConfigError, ExchangeError
from r1ray.exchange.base import Exchange, ExchangeStats, StepOutcome, StepTotals
from r1ray.exchange.transport import Pending, Transport
from r1ray.exchange.update_rule import UpdateRule

__all__ = ["DenseExchange"]

_BUCKET_BYTES = 32 << 20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DenseExchange(Exchange):
    """All-reduce in fp32 or bf16. Keeps nothing of its own between steps but the optimizer."""

    def __init__(self, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        self._dtype = _DTYPES[dtype]
        self._wait_s = 0.0

    def setup(
        self, parameters: Sequence[nn.Parameter], transport: Transport, rule: UpdateRule
    ) -> None:
        self._transport = transport
        self._rule = rule
        self._parameters = list(parameters)
        self.optimizer = rule.build_optimizer(
            [item for item in parameters if item.dim() >= 2],
            [item for item in parameters if item.dim() < 2],
        )
        self._buckets: list[list[nn.Parameter]] = [[]]
        size_bytes = 0
        for parameter in parameters:
            if size_bytes > _BUCKET_BYTES:
                self._buckets.append([])
                size_bytes = 0
            self._buckets[-1].append(parameter)
            size_bytes += parameter.numel() * self._dtype.itemsize

    def step(self, totals: StepTotals) -> StepOutcome:
        joint = self._sum_over_workers(totals)
        gradients = [_gradient(parameter) for parameter in self._parameters]
        torch._foreach_div_(gradients, joint.num_targets)
        # Sums are bit-identical on all workers, so every worker reaches the same verdict.
        grad_norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(grad_norm):
            return StepOutcome("skip", joint)
        factor = self._rule.clip_factor(grad_norm)
        if factor < 1:
            torch._foreach_mul_(gradients, factor)
        learning_rate = self._rule.learning_rate_at(self.num_updates)
        self._rule.set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.num_updates += 1
        return StepOutcome("apply", joint, learning_rate, grad_norm)

    def _sum_over_workers(self, totals: StepTotals) -> StepTotals:
        device = self._parameters[0].device
        values = torch.tensor(
            [totals.loss_sum, totals.num_targets, totals.num_tokens],
            dtype=torch.float64,
            device=device,
        )
        sums = self._transport.all_reduce_sum(values)
        peaks = torch.tensor(totals.peaks, dtype=torch.float32, device=device)
        if totals.peaks and self._transport.world_size > 1:
            started = time.perf_counter()  # here the first one waits for the others
            peaks = self._transport.all_gather(peaks).amax(0)
            self._wait_s += time.perf_counter() - started
        pending: list[tuple[Pending, Tensor, list[nn.Parameter]]] = []
        for bucket in self._buckets if self._transport.world_size > 1 else []:
            flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
            flat = flat.to(self._dtype)
            pending.append((self._transport.all_reduce_sum(flat), flat, bucket))
        started = time.perf_counter()
        sums.wait()
        for transfer, flat, bucket in pending:
            transfer.wait()
            _scatter(flat, bucket)
        self._wait_s += time.perf_counter() - started
        loss_sum, num_targets, num_tokens = values.tolist()
        if num_targets < 1:
            raise ExchangeError("no worker had a target token in this step; check the BatchSet")
        return StepTotals(loss_sum, int(num_targets), int(num_tokens), tuple(peaks.tolist()))

    def state_dict(self) -> dict[str, Any]:
        if self._transport.rank != 0:
            return {}
        return {"num_updates": self.num_updates, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        if "optimizer" not in states[0]:
            raise ConfigError(
                "the checkpoint of this run was saved with train.resources.tiers; restore them, or "
                "change run.name to begin anew"
            )
        self.num_updates = states[0]["num_updates"]
        self.optimizer.load_state_dict(states[0]["optimizer"])

    def stats(self) -> ExchangeStats:
        return ExchangeStats(
            self._transport.sent_bytes, self._transport.received_bytes, self._wait_s
        )

    def close(self) -> None:
        return None  # the transport is the caller's


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _scatter(flat: Tensor, bucket: list[nn.Parameter]) -> None:
    start = 0
    for parameter in bucket:
        end = start + parameter.numel()
        _gradient(parameter).copy_(flat[start:end].view_as(parameter))
        start = end
