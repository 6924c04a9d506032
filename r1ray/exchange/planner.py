"""Which exchange pays on a given link: measured rates in, estimates and a choice out.

With P parameters, N workers and B bytes a second out of each, a dense step moves 2(N-1)/N · P ·
bits/8 bytes and waits for them after computing; delta4 moves a ninth; its asynchronous form hides
that behind computing; stream moves the same once in H steps. Encoding costs time on the same
cores and hides behind nothing.

The choice is the first of dense fp32, dense bf16, delta4, delta4_async, stream, from exact to
approximate, whose mean step is at most a tenth longer than the shortest one. A step of stream
counts twice: local steps learn less from the same data (how much, the exchange benchmark measures).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from r1ray.config.exchange import (
    Delta4AsyncExchangeConfig,
    Delta4ExchangeConfig,
    DenseExchangeConfig,
    ExchangeConfig,
    StreamExchangeConfig,
)
from r1ray.exchange.codecs import get_codec
from r1ray.exchange.transport import Transport

__all__ = [
    "Estimate",
    "Measurements",
    "candidates",
    "choose",
    "describe_plan",
    "estimate",
    "measure_codec_rate",
    "measure_link_rate",
]

_BYTES_PER_ELEMENT = {"fp32": 4.0, "bf16": 2.0, "delta4": 4 / 9}
_TOLERANCE = 1.1
_STREAM_WEIGHT = 2.0
_MERGES, _MIN_LOCAL_STEPS, _MAX_LOCAL_STEPS = 30, 4, 100
_PROBE_S = 0.2
_MAX_PROBE_BYTES = 16 << 20


@dataclass(frozen=True)
class Measurements:
    """What the estimates rest on; the slowest worker's.

    Attributes:
        compute_s: of one step without any exchange.
        link_rate: bytes a second that a worker sends while all send.
        codec_rate: elements a second through encode and decode.
    """

    num_parameters: int
    world_size: int
    compute_s: float
    link_rate: float
    codec_rate: float


@dataclass(frozen=True)
class Estimate:
    """One exchange's cost per step and worker.

    Attributes:
        step_s: computing, encoding, and waiting that nothing hides.
        sent_bytes: on average over steps.
        weight: steps it takes to learn what one exact step does, assumed.
    """

    config: ExchangeConfig
    step_s: float
    sent_bytes: float
    weight: float = 1.0

    @property
    def cost_s(self) -> float:
        """What the choice goes by."""
        return self.step_s * self.weight


def estimate(config: ExchangeConfig, measured: Measurements) -> Estimate:
    """What a step with this exchange takes."""
    share = 2 * (measured.world_size - 1) / measured.world_size
    elements = share * measured.num_parameters
    if isinstance(config, DenseExchangeConfig):
        sent = elements * _BYTES_PER_ELEMENT[config.dtype]
        return Estimate(config, measured.compute_s + sent / measured.link_rate, sent)
    sent = elements * _BYTES_PER_ELEMENT["delta4"]
    coding_s = 2 * measured.num_parameters / measured.codec_rate
    transfer_s = sent / measured.link_rate
    waiting_s = measured.compute_s + coding_s + transfer_s
    if isinstance(config, Delta4ExchangeConfig):
        return Estimate(config, waiting_s, sent)
    if isinstance(config, StreamExchangeConfig):
        sent, coding_s, transfer_s = (
            value / config.local_steps for value in (sent, coding_s, transfer_s)
        )
        step_s = max(measured.compute_s + coding_s, transfer_s)
        return Estimate(config, step_s, sent, weight=_STREAM_WEIGHT)
    assert isinstance(config, Delta4AsyncExchangeConfig)
    overlapped_s = max(measured.compute_s + coding_s, coding_s + transfer_s)
    step_s = overlapped_s + config.sync_share * (waiting_s - overlapped_s)
    return Estimate(config, step_s, sent)


def choose(estimates: Sequence[Estimate]) -> Estimate:
    """The first that costs at most a tenth more than the cheapest."""
    least = min(item.cost_s for item in estimates)
    return next(item for item in estimates if item.cost_s <= _TOLERANCE * least)


def describe_plan(measured: Measurements, estimates: Sequence[Estimate]) -> str:
    """The measurements, what each alternative would cost, and the choice, in words."""
    chosen = choose(estimates)
    lines = [
        f"exchange auto: {measured.world_size} workers, {measured.num_parameters / 1e6:.1f}M "
        f"parameters, {measured.compute_s:.3f} s of computing a step, "
        f"{measured.link_rate * 8 / 1e6:.0f} Mbit/s out of each worker"
    ]
    for item in estimates:
        dtype = f" {item.config.dtype}" if isinstance(item.config, DenseExchangeConfig) else ""
        lines.append(
            f"  {'->' if item is chosen else '  '} {item.config.type + dtype:13} "
            f"{item.step_s:8.3f} s a step, {item.sent_bytes / 1e6:9.3f} MB sent"
        )
    dense = estimates[0].step_s
    lines.append(
        f"  {chosen.config.type}: {dense / chosen.step_s:.1f}x the steps of dense fp32; the first "
        f"in this order within {100 * (_TOLERANCE - 1):.0f}% of the cheapest, a step of stream "
        f"counted {_STREAM_WEIGHT:g} times"
    )
    return "\n".join(lines)


def measure_link_rate(transport: Transport) -> float:
    """Bytes a second out of this worker while all send to all; every worker calls it.

    Messages double until one exchange takes a fifth of a second, or 16 MiB.
    """
    if transport.world_size == 1:
        return float("inf")
    size = 1 << 14
    while True:
        payload = torch.zeros(size, dtype=torch.uint8)
        transport.all_gather(torch.zeros(1))  # start together
        started = time.perf_counter()
        transport.all_to_all([payload] * transport.world_size, [size] * transport.world_size)
        seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        slowest = float(transport.all_gather(seconds).max())
        if slowest >= _PROBE_S or size >= _MAX_PROBE_BYTES:
            return size * (transport.world_size - 1) / slowest
        size *= 2


def measure_codec_rate(codec: str, device: torch.device) -> float:
    """Elements a second through one encode and one decode on this worker."""
    x = torch.randn(1 << 20, device=device)
    coder = get_codec(codec)
    coder.decode(coder.encode(x), len(x))
    started = time.perf_counter()
    coder.decode(coder.encode(x), len(x))
    return len(x) / (time.perf_counter() - started)


def candidates(num_steps: int) -> list[ExchangeConfig]:
    """What there is to choose from for a run of so many steps, from exact to approximate.

    Streaming merges every fragment thirty times, or at every hundredth step; runs too short for
    that at four local steps a merge do without it.
    """
    exact: list[ExchangeConfig] = [
        DenseExchangeConfig(type="dense"),
        DenseExchangeConfig(type="dense", dtype="bf16"),
        Delta4ExchangeConfig(type="delta4"),
        Delta4AsyncExchangeConfig(type="delta4_async"),
    ]
    local_steps = min(num_steps // _MERGES, _MAX_LOCAL_STEPS)
    if local_steps < _MIN_LOCAL_STEPS:
        return exact
    overlap_steps = min(5, local_steps // 4)
    stream = StreamExchangeConfig(
        type="stream", local_steps=local_steps, overlap_steps=overlap_steps
    )
    return [*exact, stream]
