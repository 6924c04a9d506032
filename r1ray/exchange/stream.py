"""Streaming DiLoCo with 4-bit deltas: local steps, and merges of one fragment at a time.

1. Every worker makes local AdamW steps on its own gradients: clipped by their own norm, divided by
   its own target tokens. A gradient that is not finite is left out, by that worker alone.
2. Weights are cut into F fragments (see stream_fragments), each sent every H steps, H/F apart. Of
   every fragment each worker owns one shard. A worker sends to each owner the int4 code of what it
   has learned and not sent (see stream_copy).
3. The owner merges the deltas by a Nesterov step and broadcasts the int4 code of what it moved the
   global weights by (see stream_merge). Everybody adds the decoded broadcast to its copy of them:
   the same bits everywhere.
4. `overlap_steps` after sending, the local weights move by what the global weights moved by, and
   lose what of their own was merged. So they are always the global weights plus what this worker
   has learned and nobody has merged yet, the steps made meanwhile included. A broadcast that is not
   there is waited for `grace_s`, then taken over when it comes. One version of a fragment at most
   is under way, so whoever lags far is waited for.
5. The phase ends with one merge of everything that waits for everybody; from then on all weights
   are bit-identical, and `delta4` makes the last steps, with every owner's own Adam moments.

Between merges the workers' weights differ by design. `flush` takes over what is under way and
compares the global weights; a checkpoint holds every rank's own weights and moments, since a merge
at every checkpoint would cost a whole round of bytes. With another number of workers, training
resumes from the global weights.

Price, per worker: 2(N-1)/N · 4.1 bits per parameter sent, and as much received, in H steps: 1/776
of fp32 all-reduce at H = 100 before zstd. Memory: 4 bytes per parameter for the global weights, 8/N
for the owner's state, 4/F for a fragment under way.

Source: Douillard et al. 2025, arXiv:2501.18512. There the local weights become a mixture,
alpha·local + (1-alpha)·global, which forgets a part of the overlapped steps.
"""

import functools
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r1ray.config.exchange import StreamExchangeConfig
from r1ray.errors import ExchangeError
from r1ray.exchange.base import Exchange, ExchangeStats, StepOutcome, StepTotals
from r1ray.exchange.codecs import get_codec
from r1ray.exchange.delta4 import DeltaExchange
from r1ray.exchange.mailbox import Kind, Mailbox
from r1ray.exchange.peers import connect_peers
from r1ray.exchange.stream_copy import FragmentCopy
from r1ray.exchange.stream_fragments import cut_fragments
from r1ray.exchange.stream_merge import Broadcast, ShardOwner
from r1ray.exchange.stream_schedule import StreamSchedule
from r1ray.exchange.transport import Transport
from r1ray.exchange.update_rule import UpdateRule

__all__ = ["StreamExchange"]

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 1.0


class StreamExchange(Exchange):
    """The training thread's side: local steps, sending and taking over on a fixed schedule.

    Attributes:
        num_updates: while streaming, steps made, those left out included: the schedule must be the
            same everywhere.
    """

    def __init__(self, config: StreamExchangeConfig) -> None:
        self._config = config
        self._tail: DeltaExchange | None = None
        self._wait_s = 0.0
        self._residual_norm = 0.0
        self._staleness_steps = 0
        self._told_at = 0.0
        self._tell_every_s = min(_TELL_EVERY_S, config.timeout_s / 4)

    def setup(
        self, parameters: Sequence[nn.Parameter], transport: Transport, rule: UpdateRule
    ) -> None:
        config = self._config
        self._transport = transport
        self._rule = rule
        self._parameters = list(parameters)
        self._matrices = [item for item in parameters if item.dim() >= 2]
        self._vectors = [item for item in parameters if item.dim() < 2]
        self.optimizer = rule.build_optimizer(self._matrices, self._vectors)
        self._schedule = StreamSchedule(
            num_steps=rule.num_steps - math.floor(config.tail_share * rule.num_steps),
            num_fragments=config.num_fragments,
            local_steps=config.local_steps,
            overlap_steps=config.overlap_steps,
        )
        fragments = cut_fragments(parameters, config.num_fragments, transport.world_size)
        codec = get_codec("int4_zstd")
        self._copies = [FragmentCopy(fragment, codec, transport.rank) for fragment in fragments]
        self._control = transport.fork()
        self._mailbox = Mailbox(
            transport.rank,
            connect_peers(self._control, timeout_s=config.timeout_s),
            num_fragments=config.num_fragments,
            # A byte an element, twice what int4 takes, and room for headers.
            max_payload_bytes=max(item.numel for item in fragments) + transport.world_size + 1024,
            max_waiting=4 * config.num_fragments * transport.world_size,
        )
        self._owner = ShardOwner(
            transport.rank,
            transport.world_size,
            self._mailbox,
            codec,
            self._schedule,
            [item.numel for item in fragments],
            momentum=config.outer_momentum,
            grace_s=config.grace_s,
        )
        self._owner_state = self._owner.state_dict()

    @property
    def is_local(self) -> bool:  # type: ignore[override]
        """True while streaming: weights differ between workers, too."""
        return not self._mailbox.is_closed

    def step(self, totals: StepTotals) -> StepOutcome:
        """As the base says; while streaming, totals and verdict are this worker's own.

        `wait` then means that it had no target token.
        """
        if self._tail is not None:
            outcome = self._tail.step(totals)
            self.num_updates = self._tail.num_updates
            return outcome
        self._owner.start(self.num_updates)
        self._mailbox.check()
        outcome = self._step_locally(totals)
        self.num_updates += 1
        if time.monotonic() - self._told_at >= self._tell_every_s:
            self._tell()
        for fragment, version in self._schedule.sends(self.num_updates):
            self._contribute(fragment, version)
        for fragment, copy in enumerate(self._copies):
            if copy.under_way is not None:
                late = self._age(fragment) - self._config.overlap_steps
                if late >= 0:
                    self._take_over(fragment, self._config.grace_s if late == 0 else 0.0)
        if self.num_updates == self._schedule.num_steps:
            self._end_streaming()
        return outcome

    def flush(self) -> StepOutcome:
        """Take over what is under way; weights are the same only when streaming is over."""
        if self._tail is not None:
            return self._tail.flush()
        if self.is_local:
            self._complete()
            # Nobody can go on, and have this owner merge, before all have come to the comparison.
            self._owner_state = self._owner.state_dict()
            self._compare_global_weights()
        return StepOutcome("wait")

    def _step_locally(self, totals: StepTotals) -> StepOutcome:
        if totals.num_targets == 0:
            return StepOutcome("wait")
        gradients = [item.grad for item in self._parameters if item.grad is not None]
        torch._foreach_div_(gradients, totals.num_targets)
        grad_norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(grad_norm):
            logger.warning("step %d: this worker's gradient is not finite", self.num_updates + 1)
            return StepOutcome("skip", totals)
        torch._foreach_mul_(gradients, self._rule.clip_factor(grad_norm))
        learning_rate = self._rule.learning_rate_at(self.num_updates)
        self._rule.set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        for copy in self._copies:
            copy.num_targets += totals.num_targets
        return StepOutcome("apply", totals, learning_rate, grad_norm)

    def _contribute(self, fragment: int, version: int) -> None:
        self._complete(fragment)
        for owner, contribution in enumerate(self._copies[fragment].contribute(version)):
            payload = contribution.pack()
            self._mailbox.send(owner, Kind.CONTRIBUTION, fragment, version, payload)
        self._residual_norm = self._copies[fragment].residual_norm

    def _take_over(self, fragment: int, timeout_s: float) -> None:
        """Take over what arrives within `timeout_s` of the fragment's version under way."""
        copy = self._copies[fragment]
        started = time.monotonic()
        while copy.lacking():
            left_s = max(0.0, started + timeout_s - time.monotonic())
            frame = self._mailbox.take(Kind.BROADCAST, left_s)
            if frame is None:
                break
            broadcast = Broadcast.unpack(frame, self._transport.world_size)
            self._copies[frame.fragment].receive(frame.sender, broadcast)
        self._wait_s += time.monotonic() - started
        self._staleness_steps = self._age(fragment)
        copy.take_over()

    def _complete(self, *fragments: int) -> None:
        """Wait for all that is under way (of all fragments if none is given), and take it over.

        Raises:
            ExchangeError: nothing was heard of any worker for `timeout_s`.
        """
        for fragment in fragments or range(len(self._copies)):
            copy = self._copies[fragment]
            if copy.under_way is None:
                continue
            self._tell()
            self._mailbox.begin_to_listen()
            while copy.under_way is not None and copy.lacking():
                if self._mailbox.silent_s() >= self._config.timeout_s:
                    # Where this worker's own shard is not merged, the owners themselves wait.
                    owners = copy.lacking()
                    late = self._owner.missing(fragment) if self._transport.rank in owners else []
                    raise self._silence(late or owners)
                self._take_over(fragment, self._tell_every_s)
            if copy.under_way is not None:
                self._take_over(fragment, 0.0)

    def _tell(self) -> None:
        """Let the others know that this worker goes on: they wait for whoever is merely slow."""
        self._told_at = time.monotonic()
        self._mailbox.tell(self.num_updates)

    def _silence(self, ranks: Sequence[int]) -> ExchangeError:
        return ExchangeError(
            f"rank {', '.join(map(str, ranks))} has not answered, and no worker has made a step, "
            f"for {self._config.timeout_s:g} s; start again from the last checkpoint"
        )

    def _age(self, fragment: int) -> int:
        """Steps made since the fragment's version under way was sent."""
        version = self._copies[fragment].under_way
        assert version is not None, "something is under way"
        return self.num_updates - self._schedule.sent_at(fragment, version)

    def _compare_global_weights(self) -> None:
        """Raise ExchangeError if they differ between workers. Also a barrier."""
        checksum = 0
        for copy in self._copies:
            checksum = zlib.crc32(copy.global_E.numpy().tobytes(), checksum)
        started = time.monotonic()
        self._tell()
        if behind := self._mailbox.wait_for_step(self.num_updates, self._config.timeout_s):
            raise self._silence(behind)
        checksums = self._control.all_gather(torch.tensor([checksum])).flatten().tolist()
        self._wait_s += time.monotonic() - started
        if len(set(checksums)) > 1:
            raise ExchangeError(
                f"after step {self.num_updates} the workers' global weights differ (checksums "
                f"{checksums}); start again from the last checkpoint"
            )

    def _end_streaming(self) -> None:
        """Merge all that was learned: from here on all weights are the same."""
        self._complete()
        for fragment in range(len(self._copies)):
            self._contribute(fragment, self._schedule.final_version(fragment))
        self._complete()
        for copy in self._copies:
            copy.adopt_global()
        self._compare_global_weights()
        self._begin_tail()

    def _begin_tail(self) -> None:
        """Hand over to `delta4` as if resuming what this worker, alone, had saved.

        All hold the same weights; of the Adam moments every owner takes its shard from its own.
        """
        state = {
            "num_updates": self.num_updates,
            "num_steps": 0,
            "master": self._flatten(lambda item: item.detach()),
            "residual": self._flatten(torch.zeros_like),
        }
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = self._flatten(functools.partial(self._moment, name))
        self._load_tail([state])

    def _moment(self, name: str, item: nn.Parameter) -> Tensor:
        moment = self.optimizer.state[item].get(name)
        return torch.zeros_like(item) if moment is None else moment

    def _load_tail(self, states: Sequence[dict[str, Any]]) -> None:
        """End what streaming needed; make the steps that are left with `delta4`."""
        self._mailbox.close()
        self._owner.close()
        self._copies = []
        if self._schedule.num_steps < self._rule.num_steps:
            self._tail = DeltaExchange()
            self._tail.setup(self._parameters, self._transport, self._rule)
            self._tail.load_state_dict(states)
            self.optimizer = self._tail.optimizer

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"num_updates": self.num_updates}
        if self.is_local:
            state["optimizer"] = self.optimizer.state_dict()
            state["owner"] = self._owner_state
            state["copies"] = [copy.state_dict() for copy in self._copies]
        elif self._tail is not None:
            state["tail"] = self._tail.state_dict()
        return state

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        self.num_updates = states[0]["num_updates"]
        if "copies" not in states[0]:
            self._load_tail([state["tail"] for state in states if "tail" in state])
            return
        own = states[self._transport.rank % len(states)]
        self.optimizer.load_state_dict(own["optimizer"])
        for fragment, copy in enumerate(self._copies):
            version = self._schedule.next_version(fragment, self.num_updates)
            copy.load_state_dict([state["copies"][fragment] for state in states], version)
        self._owner.load_state_dict([state["owner"] for state in states])
        self._owner_state = self._owner.state_dict()

    def stats(self) -> ExchangeStats:
        tail = self._tail.stats() if self._tail is not None else ExchangeStats(0, 0, 0.0)
        return ExchangeStats(
            self._mailbox.sent_bytes + self._control.sent_bytes + tail.sent_bytes,
            self._mailbox.received_bytes + self._control.received_bytes + tail.received_bytes,
            self._wait_s + tail.wait_s,
            tail.residual_norm if self._tail else self._residual_norm,
            tail.staleness_steps if self._tail else self._staleness_steps,
        )

    def close(self) -> None:
        self._mailbox.close()
        self._owner.close()
        if self._tail is not None:
            self._tail.close()
        self._control.close()

    def _flatten(self, value_of: Callable[[nn.Parameter], Tensor]) -> tuple[Tensor, Tensor]:
        """(of all matrices, of all vectors), each as one vector."""
        return _concatenate(map(value_of, self._matrices)), _concatenate(
            map(value_of, self._vectors)
        )


def _concatenate(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0), *(item.flatten().cpu() for item in tensors)])
