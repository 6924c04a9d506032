"""The exchange that chooses another: it measures the link and two steps, then decides.

1. At set-up the workers measure what they send a second, all to all.
2. The first two steps only add up their gradients (`wait`) and time computing; nothing is lost, the
   first update covers three steps' batches.
3. In the third step, or before an earlier checkpoint, the workers agree on the slowest worker's
   figures, the planner chooses, and the chosen exchange takes over, for good: a resumed run
   continues with it.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from r1ray.config.exchange import ExchangeConfig
from r1ray.exchange.base import Exchange, ExchangeStats, StepOutcome, StepTotals
from r1ray.exchange.planner import (
    Measurements,
    candidates,
    choose,
    describe_plan,
    estimate,
    measure_codec_rate,
    measure_link_rate,
)
from r1ray.exchange.transport import Transport
from r1ray.exchange.update_rule import UpdateRule

__all__ = ["AutoExchange"]

_NUM_TIMED_STEPS = 2


class AutoExchange(Exchange):
    """Stands in for the exchange it chooses.

    Args:
        build: makes the exchange of a configuration.
    """

    def __init__(self, build: Callable[[ExchangeConfig], Exchange]) -> None:
        self._build = build
        self._chosen: Exchange | None = None
        self._config: ExchangeConfig | None = None
        self._num_steps_before = 0  # they only measured

    def setup(
        self, parameters: Sequence[nn.Parameter], transport: Transport, rule: UpdateRule
    ) -> None:
        self._parameters = list(parameters)
        self._transport, self._rule = transport, rule
        self._probe = transport.fork()
        self._link_rate = measure_link_rate(self._probe)
        self._sums: list[Tensor] | None = None
        self._totals: list[StepTotals] = []
        self._compute_s: list[float] = []
        self._mark = time.perf_counter()

    @property
    def num_updates(self) -> int:  # type: ignore[override]
        """Updates applied by the chosen exchange."""
        return 0 if self._chosen is None else self._chosen.num_updates

    @property
    def is_local(self) -> bool:  # type: ignore[override]
        return self._chosen is not None and self._chosen.is_local

    def step(self, totals: StepTotals) -> StepOutcome:
        if self._chosen is not None:
            return self._chosen.step(totals)
        self._compute_s.append(time.perf_counter() - self._mark)
        self._totals.append(totals)
        if len(self._totals) <= _NUM_TIMED_STEPS:
            self._set_gradients_aside()
            self._mark = time.perf_counter()
            return StepOutcome("wait")
        self._take_gradients_back()
        return self._decide().step(_joined(self._totals))

    def _set_gradients_aside(self) -> None:
        gradients = [_gradient(parameter) for parameter in self._parameters]
        if self._sums is None:
            self._sums = [gradient.clone() for gradient in gradients]
        else:
            torch._foreach_add_(self._sums, gradients)
        torch._foreach_zero_(gradients)  # a flush may follow before the caller does so

    def _take_gradients_back(self) -> None:
        assert self._sums is not None, "there were timed steps"
        torch._foreach_add_([_gradient(parameter) for parameter in self._parameters], self._sums)
        self._sums = None

    def _decide(self) -> Exchange:
        device = self._parameters[0].device
        compute_s = min(self._compute_s)  # the first one is cold: it allocates and pages in
        codec_rate = measure_codec_rate("int4_zstd", device)
        mine = torch.tensor([-compute_s, self._link_rate, codec_rate], dtype=torch.float64)
        slowest = self._probe.all_gather(mine).amin(0).tolist()
        measured = Measurements(
            num_parameters=sum(parameter.numel() for parameter in self._parameters),
            world_size=self._transport.world_size,
            compute_s=-slowest[0],
            link_rate=slowest[1],
            codec_rate=slowest[2],
        )
        estimates = [estimate(config, measured) for config in candidates(self._rule.num_steps)]
        self.plan = describe_plan(measured, estimates)
        return self._adopt(choose(estimates).config, num_steps_before=len(self._totals) - 1)

    def _adopt(self, config: ExchangeConfig, *, num_steps_before: int) -> Exchange:
        """Hand over; the chosen exchange sees only the steps that are left."""
        self._probe.close()
        self._config, self._num_steps_before = config, num_steps_before
        self._chosen = self._build(config)
        rule = dataclasses.replace(self._rule, num_steps=self._rule.num_steps - num_steps_before)
        self._chosen.setup(self._parameters, self._transport, rule)
        return self._chosen

    def flush(self) -> StepOutcome:
        if self._chosen is not None:
            return self._chosen.flush()
        if not self._totals:
            return StepOutcome("wait")
        self._take_gradients_back()
        chosen = self._decide()
        outcome = chosen.step(_joined(self._totals))
        flushed = chosen.flush()
        return flushed if outcome.verdict == "wait" else outcome

    def state_dict(self) -> dict[str, Any]:
        assert self._chosen is not None, "flush comes first"
        assert self._config is not None, "it is set with the choice"
        config = TypeAdapter(ExchangeConfig).dump_python(self._config)
        return {
            "config": config,
            "num_steps_before": self._num_steps_before,
            "chosen": self._chosen.state_dict(),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        config = TypeAdapter(ExchangeConfig).validate_python(states[0]["config"])
        chosen = self._adopt(config, num_steps_before=states[0]["num_steps_before"])
        chosen.load_state_dict([state["chosen"] for state in states])

    def stats(self) -> ExchangeStats:
        stats = ExchangeStats(0, 0, 0.0) if self._chosen is None else self._chosen.stats()
        return dataclasses.replace(
            stats,
            sent_bytes=stats.sent_bytes + self._probe.sent_bytes,
            received_bytes=stats.received_bytes + self._probe.received_bytes,
        )

    def close(self) -> None:
        if self._chosen is None:
            self._probe.close()
        else:
            self._chosen.close()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _joined(totals: Sequence[StepTotals]) -> StepTotals:
    """Sums over steps, with the greatest of each peak."""
    return StepTotals(
        sum(item.loss_sum for item in totals),
        sum(item.num_targets for item in totals),
        sum(item.num_tokens for item in totals),
        tuple(max(values) for values in zip(*(item.peaks for item in totals), strict=True)),
    )
