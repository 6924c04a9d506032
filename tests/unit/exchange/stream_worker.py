"""A worker of a streaming run between threads, for tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r1ray.config.exchange import StreamExchangeConfig
from r1ray.exchange.base import StepTotals
from r1ray.exchange.stream import StreamExchange
from r1ray.exchange.update_rule import UpdateRule
from tests.unit.exchange.threads import ThreadTransport, run_workers

NUM_STEPS = 40


def stream_config(**changes: Any) -> StreamExchangeConfig:
    values: dict[str, Any] = {
        "local_steps": 8,
        "num_fragments": 2,
        "overlap_steps": 2,
        "outer_momentum": 0.5,
        "tail_share": 0.1,
        "timeout_s": 10.0,
    }
    return StreamExchangeConfig(type="stream", **{**values, **changes})


class Worker:
    """A small network fitted to a random one, each worker on batches of its own."""

    def __init__(
        self, transport: ThreadTransport, config: StreamExchangeConfig, num_steps: int = NUM_STEPS
    ) -> None:
        self.rank = transport.rank
        self.transport = transport
        self.model = self._network(0)
        self._teacher = self._network(1)
        self.exchange = StreamExchange(config)
        rule = UpdateRule(lambda number: 0.01, num_steps=num_steps)
        self.exchange.setup(list(self.model.parameters()), transport, rule)
        self.losses: list[float] = []

    def _network(self, seed: int) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))
        generator = torch.Generator().manual_seed(seed)  # torch's own is shared by all threads
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        return model

    def run(self, start: int, stop: int, before: Callable[[int], None] = lambda step: None) -> None:
        """Steps of these numbers; `before` may be late, or spoil a gradient's batch."""
        for step in range(start, stop):
            before(step)
            self.exchange.step(self.backward(step))

    def backward(self, step: int) -> StepTotals:
        count = 12 + 4 * self.rank
        generator = torch.Generator().manual_seed(1000 * step + self.rank)
        x = torch.randn(count, 8, generator=generator)
        self.model.zero_grad()
        loss = ((self.model(x) - self._teacher(x)) ** 2).sum()
        loss.backward()
        self.losses.append(loss.item() / count)
        return StepTotals(loss.item(), num_targets=count, num_tokens=count)

    def weights(self) -> Tensor:
        return torch.cat([item.detach().flatten().clone() for item in self.model.parameters()])

    def close(self) -> None:
        self.transport.all_gather(torch.zeros(1))
        self.exchange.close()


def results_of(world_size: int, work: Callable[[ThreadTransport], Any]) -> list[Any]:
    results = run_workers(world_size, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
