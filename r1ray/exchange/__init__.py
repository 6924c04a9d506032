"""Bringing workers together: codecs and transports below, strategies above."""

from r1ray.config.exchange import (
    AutoExchangeConfig,
    Delta4AsyncExchangeConfig,
    DenseExchangeConfig,
    ExchangeConfig,
    StreamExchangeConfig,
)
from r1ray.exchange.auto import AutoExchange
from r1ray.exchange.base import Exchange, ExchangeStats, StepOutcome, StepTotals, Verdict
from r1ray.exchange.delta4 import DeltaExchange
from r1ray.exchange.dense import DenseExchange
from r1ray.exchange.offloaded import OffloadedExchange
from r1ray.exchange.stream import StreamExchange
from r1ray.exchange.transport import CollectiveTransport, LocalTransport, Transport
from r1ray.exchange.update_rule import UpdateRule

__all__ = [
    "CollectiveTransport",
    "Exchange",
    "ExchangeStats",
    "LocalTransport",
    "OffloadedExchange",
    "StepOutcome",
    "StepTotals",
    "Transport",
    "UpdateRule",
    "Verdict",
    "build_exchange",
]


def build_exchange(config: ExchangeConfig) -> Exchange:
    """The exchange that `train.exchange` asks for."""
    if isinstance(config, AutoExchangeConfig):
        return AutoExchange(build_exchange)
    if isinstance(config, DenseExchangeConfig):
        return DenseExchange(config.dtype)
    if isinstance(config, StreamExchangeConfig):
        return StreamExchange(config)
    stale = config if isinstance(config, Delta4AsyncExchangeConfig) else None
    return DeltaExchange(
        config.codec,
        error_feedback=config.error_feedback,
        checksum_every_steps=config.checksum_every_steps,
        sync_share=stale.sync_share if stale else None,
        beta1=stale.adam_beta1 if stale else None,
    )
