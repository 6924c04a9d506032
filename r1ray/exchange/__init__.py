"""Exchanging gradients between workers: transports below, strategies above."""

from r1ray.config.schema import DenseExchangeConfig
from r1ray.exchange.base import Exchange, ExchangeStats, StepTotals, Verdict
from r1ray.exchange.dense import DenseExchange
from r1ray.exchange.transport import CollectiveTransport, LocalTransport, Transport

__all__ = [
    "CollectiveTransport",
    "Exchange",
    "ExchangeStats",
    "LocalTransport",
    "StepTotals",
    "Transport",
    "Verdict",
    "build_exchange",
]


def build_exchange(config: DenseExchangeConfig) -> Exchange:
    """The exchange that `train.exchange` asks for."""
    return DenseExchange(config.dtype)
