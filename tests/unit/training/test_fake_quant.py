"""Quantization-aware training: a step through the rounding, with every exchange and precision."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from r1ray.config.exchange import ExchangeConfig
from r1ray.config.schema import Scheme
from r1ray.config.training import TrainConfig
from r1ray.exchange import LocalTransport, Transport, build_exchange
from r1ray.models import Decoder
from r1ray.models.quantization import SCHEMES, fake_quantize_modules, quantize_modules
from r1ray.training.loss import summed_loss
from r1ray.training.step import TrainState
from tests.fakes import tiny_config, tiny_model
from tests.unit.exchange.threads import run_workers
from tests.unit.training.batches import random_batch, split

NUM_STEPS = 16
INITIAL = tiny_model(tie_embeddings=True).state_dict()
BATCH = random_batch(8, 24, seed=0)


def _train(transport: Transport, scheme: Scheme | None, **changes: Any) -> dict[str, Any]:
    """A tiny model after some steps on one batch, this worker's part of it each step."""
    config = TrainConfig(
        warmup_steps=2,
        batches_per_step=transport.world_size,
        **{"num_steps": NUM_STEPS, "precision": "fp32", "learning_rate": 1e-2, **changes},
    )
    model = Decoder(tiny_config(tie_embeddings=True))  # thread-safe, unlike drawing the weights
    model.load_state_dict(INITIAL)
    if scheme is not None:
        fake_quantize_modules(model, scheme)
    state = TrainState(model, config, build_exchange(config.exchange), transport)
    part = split(BATCH, transport.world_size)[transport.rank]
    for step in range(config.num_steps):
        record = state.run_step([part], flush=step == config.num_steps - 1)
    state.exchange.close()
    return {"weights": dict(model.state_dict()), "record": record}


def _served_loss(weights: dict[str, torch.Tensor], scheme: Scheme) -> float:
    model = tiny_model(tie_embeddings=True)
    model.load_state_dict(weights)
    quantize_modules(model, scheme)
    return _mean_loss(model)


@torch.no_grad()
def _mean_loss(model: Decoder) -> float:
    return float(summed_loss(model, BATCH)) / BATCH.num_targets


@pytest.mark.parametrize(
    "exchange",
    [
        {"type": "dense"},
        {"type": "delta4"},
        {"type": "delta4_async"},
        {"type": "stream", "local_steps": 4, "overlap_steps": 1, "tail_share": 0.25},
    ],
    ids=lambda exchange: exchange["type"],
)
def test_every_exchange_trains_what_is_served(exchange: dict[str, Any]) -> None:
    config: ExchangeConfig = TypeAdapter(ExchangeConfig).validate_python(exchange)
    results = run_workers(2, lambda transport: _train(transport, "w4a8", exchange=config))
    for result in results:
        if isinstance(result, Exception):
            raise result
    first, second = (result["weights"] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = _served_loss(INITIAL, "w4a8")
    assert _served_loss(first, "w4a8") < 0.9 * before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_products_and_their_controller_go_with_fake_quant(precision: str) -> None:
    result = _train(LocalTransport(), "w8a8", precision=precision)
    before = _served_loss(INITIAL, "w8a8")
    after = _served_loss(result["weights"], "w8a8")
    assert after < 0.9 * before
    assert result["record"].precision == precision
    wide = _train(LocalTransport(), "w8a8", precision="fp32")
    # Products of exact integers, rounded once to 8 bits.
    assert after == pytest.approx(_served_loss(wide["weights"], "w8a8"), rel=0.03)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_that_training_reports_is_that_of_the_served_model(scheme: Scheme) -> None:
    result = _train(LocalTransport(), scheme, learning_rate=1e-9)
    served = _served_loss(result["weights"], scheme)
    assert result["record"].loss == pytest.approx(served, rel=1e-4)


def test_training_through_the_rounding_serves_better_than_rounding_afterwards() -> None:
    aware = _train(LocalTransport(), "w4a8", num_steps=120)
    plain = _train(LocalTransport(), None, num_steps=120)
    assert _served_loss(aware["weights"], "w4a8") < _served_loss(plain["weights"], "w4a8")
