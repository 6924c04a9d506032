"""The reference exchange: every gradient element is summed over the workers, uncompressed.

1. Gradients are copied into flat buckets of about 32 MiB and all-reduced.
2. Three scalars (loss, target tokens, tokens) travel with them in float64.
3. The sum is divided by the global number of target tokens.

Price: 2(N-1)/N · 4 bytes per parameter, step and worker in fp32, half in bf16, all waited for.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r1ray.errors import ExchangeError
from r1ray.exchange.base import Exchange, ExchangeStats, StepTotals, Verdict
from r1ray.exchange.transport import Pending, Transport

__all__ = ["DenseExchange"]

_BUCKET_BYTES = 32 << 20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DenseExchange(Exchange):
    """All-reduce in fp32 or bf16. Stateless between steps."""

    def __init__(self, dtype: Literal["fp32", "bf16"] = "fp32") -> None:
        self._dtype = _DTYPES[dtype]
        self._payload_bytes = 0
        self._wait_s = 0.0
        self._pending: list[tuple[Pending, Tensor, list[nn.Parameter]]] = []
        self._totals: tuple[Pending, Tensor] | None = None

    def setup(self, parameters: Sequence[nn.Parameter], transport: Transport) -> None:
        self._transport = transport
        self._buckets: list[list[nn.Parameter]] = [[]]
        size_bytes = 0
        for parameter in parameters:
            if size_bytes > _BUCKET_BYTES:
                self._buckets.append([])
                size_bytes = 0
            self._buckets[-1].append(parameter)
            size_bytes += parameter.numel() * self._dtype.itemsize

    def on_grads_ready(self, totals: StepTotals) -> None:
        values = torch.tensor(
            [totals.loss_sum, totals.num_targets, totals.num_tokens],
            dtype=torch.float64,
            device=self._buckets[0][0].device,
        )
        self._totals = (self._send(values), values)
        if self._transport.world_size == 1:
            return
        for bucket in self._buckets:
            flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
            flat = flat.to(self._dtype)
            self._pending.append((self._send(flat), flat, bucket))

    def before_step(self) -> tuple[Verdict, StepTotals]:
        assert self._totals is not None, "on_grads_ready comes first"
        started = time.perf_counter()
        self._totals[0].wait()
        loss_sum, num_targets, num_tokens = self._totals[1].tolist()
        if num_targets < 1:
            raise ExchangeError("no worker had a target token in this step; check the BatchSet")
        for pending, flat, bucket in self._pending:
            pending.wait()
            _scatter(flat, bucket)
        self._wait_s += time.perf_counter() - started
        self._pending, self._totals = [], None
        gradients = [_gradient(parameter) for bucket in self._buckets for parameter in bucket]
        torch._foreach_div_(gradients, num_targets)
        # Sums are bit-identical on all workers, so every worker reaches the same verdict.
        is_finite = all(torch.isfinite(norm) for norm in torch._foreach_norm(gradients))
        totals = StepTotals(loss_sum, int(num_targets), int(num_tokens))
        return "apply" if is_finite else "skip", totals

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], *, world_size_changed: bool) -> None:
        del state, world_size_changed  # nothing is kept between steps

    def stats(self) -> ExchangeStats:
        return ExchangeStats(self._payload_bytes, self._wait_s)

    def _send(self, x: Tensor) -> Pending:
        self._payload_bytes += x.numel() * x.element_size()
        return self._transport.all_reduce_sum(x)


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
