"""The dense exchange alone, and over two real gloo processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from r1ray.config.schema import DenseExchangeConfig
from r1ray.errors import ExchangeError
from r1ray.exchange import (
    CollectiveTransport,
    LocalTransport,
    StepTotals,
    build_exchange,
    dense,
)
from r1ray.exchange.dense import DenseExchange

NUM_ROWS = 8


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 4), (5,), (3, 5), (1,))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _backward(parameters: list[nn.Parameter], rows: range) -> StepTotals:
    """Summed squared error of a small network over the given rows of one fixed data set."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, 4, generator=generator)[rows.start : rows.stop]
    y = torch.randn(NUM_ROWS, 3, generator=generator)[rows.start : rows.stop]
    first, bias, second, scale = parameters
    loss = ((torch.tanh(x @ first.t() + bias) @ second.t() * scale - y) ** 2).sum()
    loss.backward()
    return StepTotals(loss.item(), num_targets=len(rows), num_tokens=2 * len(rows))


def _run_worker(rank: int, directory: str) -> None:
    """Three steps (fp32, NaN on rank 1, bf16); what each left behind goes to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dense._BUCKET_BYTES = 40  # several buckets
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    rows = (range(3), range(3, NUM_ROWS))[rank]  # uneven: 3 and 5
    results: dict[str, Any] = {}
    configs = {
        "fp32": DenseExchangeConfig(type="dense"),
        "nan": DenseExchangeConfig(type="dense"),
        "bf16": DenseExchangeConfig(type="dense", dtype="bf16"),
    }
    for name, config in configs.items():
        parameters = _parameters()
        exchange = build_exchange(config)
        exchange.setup(parameters, CollectiveTransport())
        totals = _backward(parameters, rows)
        if name == "nan" and rank == 1:
            gradient = parameters[2].grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        exchange.on_grads_ready(totals)
        verdict, joint = exchange.before_step()
        results[name] = {
            "verdict": verdict,
            "totals": vars(joint),
            "gradients": [parameter.grad for parameter in parameters],
            "payload_bytes": exchange.stats().payload_bytes,
        }
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory: Path = tmp_path_factory.mktemp("gloo")
    mp.spawn(_run_worker, args=(str(directory),), nprocs=2)
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]


def _joint_gradients() -> tuple[list[torch.Tensor], StepTotals]:
    parameters = _parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport())
    exchange.on_grads_ready(_backward(parameters, range(NUM_ROWS)))
    verdict, totals = exchange.before_step()
    assert verdict == "apply"
    return [parameter.grad for parameter in parameters if parameter.grad is not None], totals


def test_two_workers_equal_one_on_the_joint_batch(two_ranks: list[dict[str, Any]]) -> None:
    expected, totals = _joint_gradients()
    for result in (rank["fp32"] for rank in two_ranks):
        assert result["verdict"] == "apply"
        assert result["totals"]["num_targets"] == NUM_ROWS
        assert result["totals"]["num_tokens"] == 2 * NUM_ROWS
        assert result["totals"]["loss_sum"] == pytest.approx(totals.loss_sum, rel=1e-6)
        for found, gradient in zip(result["gradients"], expected, strict=True):
            # float32 sums over 8 rows in another order.
            torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-6)


def test_workers_end_with_identical_bits(two_ranks: list[dict[str, Any]]) -> None:
    for name in ("fp32", "bf16"):
        pairs = zip(two_ranks[0][name]["gradients"], two_ranks[1][name]["gradients"], strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)


def test_a_nan_on_one_worker_makes_both_skip(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["nan"]["verdict"] for rank in two_ranks] == ["skip", "skip"]


def test_bf16_errs_by_its_rounding_and_sends_half_the_bytes(
    two_ranks: list[dict[str, Any]],
) -> None:
    expected, _ = _joint_gradients()
    for found, gradient in zip(two_ranks[0]["bf16"]["gradients"], expected, strict=True):
        # Each of the two addends and their sum is rounded to 8 bits.
        assert (found - gradient).norm() <= 3 * 2**-8 * gradient.norm() + 1e-3
    numel = sum(parameter.numel() for parameter in _parameters())
    scalars = 3 * 8
    for rank in two_ranks:
        assert rank["fp32"]["payload_bytes"] == 4 * numel + scalars
        assert rank["bf16"]["payload_bytes"] == 2 * numel + scalars


def test_one_worker_alone_divides_by_its_targets() -> None:
    found, totals = _joint_gradients()
    parameters = _parameters()
    _backward(parameters, range(NUM_ROWS))
    assert totals.num_targets == NUM_ROWS
    for gradient, parameter in zip(found, parameters, strict=True):
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad / NUM_ROWS)


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    parameters = _parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport())
    exchange.on_grads_ready(StepTotals(1.0, 2, 4))
    assert exchange.before_step()[0] == "apply"
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped(value: float) -> None:
    parameters = _parameters()
    exchange = DenseExchange()
    exchange.setup(parameters, LocalTransport())
    totals = _backward(parameters, range(NUM_ROWS))
    assert parameters[0].grad is not None
    parameters[0].grad[1, 1] = value
    exchange.on_grads_ready(totals)
    assert exchange.before_step()[0] == "skip"


def test_no_targets_anywhere_is_an_exchange_error() -> None:
    exchange = DenseExchange()
    exchange.setup(_parameters(), LocalTransport())
    exchange.on_grads_ready(StepTotals(0.0, 0, 10))
    with pytest.raises(ExchangeError, match="no worker had a target token"):
        exchange.before_step()


def test_nothing_needs_to_be_kept_to_resume() -> None:
    exchange = DenseExchange()
    assert exchange.state_dict() == {}
    exchange.load_state_dict({}, world_size_changed=True)
