"""The dense exchange alone, and over two real gloo processes."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from r1ray.config.exchange import DenseExchangeConfig
from r1ray.errors import ExchangeError
from r1ray.exchange import (
    LocalTransport,
    StepTotals,
    Transport,
    UpdateRule,
    build_exchange,
    dense,
)
from r1ray.exchange.dense import DenseExchange
from tests.unit.exchange.gloo import run_ranks
from tests.unit.exchange.problem import (
    NUM_ROWS,
    backward,
    build_parameters,
    build_rule,
    rows_of,
    take_step,
    values_of,
)

CONFIGS = {
    "fp32": DenseExchangeConfig(type="dense"),
    "nan": DenseExchangeConfig(type="dense"),
    "bf16": DenseExchangeConfig(type="dense", dtype="bf16"),
}


def _run_worker(transport: Transport) -> dict[str, Any]:
    """One step of each kind (NaN on rank 1 alone) and what it left behind."""
    dense._BUCKET_BYTES = 300  # several buckets
    results: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        parameters = build_parameters()
        exchange = build_exchange(config)
        exchange.setup(parameters, transport, build_rule())
        already_sent = transport.sent_bytes
        totals = backward(parameters, rows_of(transport.rank, transport.world_size))
        if name == "nan" and transport.rank == 1:
            gradient = parameters[2].grad
            assert gradient is not None
            gradient[0, 0] = math.nan
        totals = dataclasses.replace(totals, peaks=(float(transport.rank), 0.5))
        results[name] = {
            "outcome": exchange.step(totals),
            "weights": values_of(parameters),
            "sent_bytes": exchange.stats().sent_bytes - already_sent,
        }
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(_run_worker, 2)


def _alone(rule: UpdateRule | None = None) -> tuple[list[torch.Tensor], Any]:
    parameters = build_parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport(), rule or build_rule())
    outcome = take_step(exchange, parameters, range(NUM_ROWS))
    return values_of(parameters), outcome


def test_two_workers_equal_one_on_the_joint_batch(two_ranks: list[dict[str, Any]]) -> None:
    expected, alone = _alone()
    for result in (rank["fp32"] for rank in two_ranks):
        outcome = result["outcome"]
        assert outcome.verdict == "apply"
        assert outcome.totals.num_targets == NUM_ROWS
        assert outcome.totals.num_tokens == 2 * NUM_ROWS
        assert outcome.totals.loss_sum == pytest.approx(alone.totals.loss_sum, rel=1e-6)
        assert outcome.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
        for found, weights in zip(result["weights"], expected, strict=True):
            # float32 sums over 8 rows in another order, then one Adam step of 0.01.
            torch.testing.assert_close(found, weights, atol=1e-5, rtol=0)


def test_workers_end_with_identical_bits(two_ranks: list[dict[str, Any]]) -> None:
    for name in ("fp32", "bf16"):
        pairs = zip(two_ranks[0][name]["weights"], two_ranks[1][name]["weights"], strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)


def test_peaks_are_agreed_by_the_greatest(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["fp32"]["outcome"].totals.peaks == (1.0, 0.5)


def test_a_nan_on_one_worker_makes_both_skip(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["nan"]["outcome"].verdict for rank in two_ranks] == ["skip", "skip"]
    for rank in two_ranks:
        for found, initial in zip(rank["nan"]["weights"], build_parameters(), strict=True):
            assert torch.equal(found, initial)


def test_bf16_errs_by_its_rounding_and_sends_half_the_bytes(
    two_ranks: list[dict[str, Any]],
) -> None:
    _, alone = _alone()
    for rank in two_ranks:
        # Each of the two addends and their sum is rounded to 8 bits.
        outcome = rank["bf16"]["outcome"]
        assert outcome.grad_norm == pytest.approx(alone.grad_norm, rel=3 * 2**-8)
    numel = sum(parameter.numel() for parameter in build_parameters())
    scalars = 3 * 8 + 2 * 4  # totals, and two peaks gathered
    for rank in two_ranks:
        assert rank["fp32"]["sent_bytes"] == 4 * numel + scalars
        assert rank["bf16"]["sent_bytes"] == 2 * numel + scalars


def test_one_worker_alone_divides_by_its_targets() -> None:
    _, outcome = _alone()
    parameters = build_parameters()
    backward(parameters, range(NUM_ROWS))
    gradients = [item.grad for item in parameters if item.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat([item.flatten() for item in gradients]))
    assert outcome.grad_norm == pytest.approx(float(norm) / NUM_ROWS, rel=1e-6)


def test_a_larger_gradient_is_scaled_down_to_the_norm() -> None:
    parameters = build_parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport(), UpdateRule(lambda _: 1e-2, 1, max_grad_norm=1e-3))
    take_step(exchange, parameters, range(NUM_ROWS))
    moments = [exchange.optimizer.state[item]["exp_avg"].flatten() for item in parameters]
    # Adam's first moment after one step is (1 - beta1) times the gradient it saw.
    seen = torch.linalg.vector_norm(torch.cat(moments)) / (1 - 0.9)
    assert float(seen) == pytest.approx(1e-3, rel=1e-3)


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    parameters = build_parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport(), build_rule())
    outcome = exchange.step(StepTotals(1.0, 2, 4))
    assert outcome.verdict == "apply"
    assert outcome.grad_norm == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_worker_alone_skips_what_is_not_finite(value: float) -> None:
    parameters = build_parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport(), build_rule())
    totals = backward(parameters, range(NUM_ROWS))
    assert parameters[1].grad is not None
    parameters[1].grad[2] = value
    assert exchange.step(totals).verdict == "skip"
    assert exchange.num_updates == 0
    for found, initial in zip(parameters, build_parameters(), strict=True):
        assert torch.equal(found, initial)


def test_a_step_without_a_target_is_an_error() -> None:
    exchange = DenseExchange()
    exchange.setup(build_parameters(), LocalTransport(), build_rule())
    with pytest.raises(ExchangeError, match="no worker had a target token"):
        exchange.step(StepTotals(0.0, 0, 4))
