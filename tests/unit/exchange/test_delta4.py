"""delta4 and delta4_async, alone and over real gloo processes on loopback."""

import itertools
import logging
import math
from typing import Any

import pytest
import torch

from r1ray.config.schema import (
    Delta4AsyncExchangeConfig,
    Delta4ExchangeConfig,
    DenseExchangeConfig,
    ExchangeConfig,
)
from r1ray.errors import ExchangeError
from r1ray.exchange import (
    CollectiveTransport,
    LocalTransport,
    StepTotals,
    build_exchange,
)
from tests.unit.exchange.gloo import TIMEOUT_S, run_ranks
from tests.unit.exchange.problem import (
    NUM_ROWS,
    backward,
    build_parameters,
    build_rule,
    rows_of,
    take_step,
    values_of,
)

DELTA4 = Delta4ExchangeConfig(type="delta4")
ASYNC = Delta4AsyncExchangeConfig(type="delta4_async", sync_share=0.1)
NUM_STEPS = 20


def _loss_after(parameters: list[Any]) -> float:
    for parameter in parameters:
        parameter.grad = None
    return backward(parameters, range(NUM_ROWS)).loss_sum


def _train(rank: int, world_size: int, config: ExchangeConfig) -> dict[str, Any]:
    """Twenty steps on one batch; what every worker ends with."""
    parameters = build_parameters()
    exchange = build_exchange(config)
    transport = CollectiveTransport(timeout_s=TIMEOUT_S)
    exchange.setup(parameters, transport, build_rule(NUM_STEPS))
    rows = rows_of(rank, world_size)
    outcomes = [take_step(exchange, parameters, rows) for _ in range(NUM_STEPS)]
    outcomes.append(exchange.flush())
    exchange.close()
    return {
        "weights": values_of(parameters),
        "outcomes": outcomes,
        "stats": exchange.stats(),
        "num_updates": exchange.num_updates,
        "loss": _loss_after(parameters),
    }


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    configs = {"dense": DenseExchangeConfig(type="dense"), "delta4": DELTA4, "async": ASYNC}
    return {name: run_ranks(_train, 3, config) for name, config in configs.items()}


@pytest.mark.parametrize("name", ["delta4", "async"])
def test_all_workers_end_with_identical_bits(
    name: str, runs: dict[str, list[dict[str, Any]]]
) -> None:
    first, *others = runs[name]
    for other in others:
        pairs = zip(first["weights"], other["weights"], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "share"), [("delta4", 0.05), ("async", 0.15)])
def test_the_loss_falls_as_with_dense(
    name: str, share: float, runs: dict[str, list[dict[str, Any]]]
) -> None:
    initial = _loss_after(build_parameters())
    gained = initial - runs["dense"][0]["loss"]
    assert gained > 0.2 * initial
    assert runs[name][0]["loss"] <= runs["dense"][0]["loss"] + share * gained


def test_a_synchronous_exchange_applies_every_gradient_at_once(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    verdicts = [outcome.verdict for outcome in runs["delta4"][0]["outcomes"]]
    assert verdicts == ["apply"] * NUM_STEPS + ["wait"]
    assert runs["delta4"][0]["stats"].staleness_steps == 0


def test_an_asynchronous_exchange_is_one_step_behind_after_its_synchronous_share(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    verdicts = [outcome.verdict for outcome in runs["async"][0]["outcomes"]]
    assert verdicts == ["apply"] * 2 + ["wait"] + ["apply"] * (NUM_STEPS - 2)
    assert runs["async"][0]["num_updates"] == NUM_STEPS
    assert runs["async"][0]["stats"].staleness_steps == 1


def test_totals_are_sums_over_the_workers(runs: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("delta4", "async"):
        for run in runs[name]:
            done = [item for item in run["outcomes"] if item.verdict == "apply"]
            assert {item.totals.num_targets for item in done} == {NUM_ROWS}
            assert {item.totals.num_tokens for item in done} == {2 * NUM_ROWS}
    first = [runs[name][0]["outcomes"][0].totals.loss_sum for name in ("dense", "delta4")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_stale_gradient_is_that_of_the_weights_one_update_ago() -> None:
    """By hand: gradient t is taken on the weights before update t - 1."""
    parameters, reference = build_parameters(), build_parameters()
    exchange = build_exchange(
        Delta4AsyncExchangeConfig(type="delta4_async", codec="int8", sync_share=0)
    )
    exchange.setup(parameters, LocalTransport(), build_rule())
    optimizer = build_rule().build_optimizer(reference[::2], reference[1::2])
    build_rule().set_rate(optimizer, 1e-2)
    pending: list[torch.Tensor] | None = None
    for step in range(4):
        take_step(exchange, parameters, range(NUM_ROWS), step)
        optimizer.zero_grad()
        totals = backward(reference, range(NUM_ROWS), step=step)
        gradients = [item.grad / totals.num_targets for item in reference if item.grad is not None]
        if pending is not None:
            for item, gradient in zip(reference, pending, strict=True):
                item.grad = gradient
            optimizer.step()
        pending = gradients
    for found, expected in zip(parameters, reference, strict=True):
        # Three updates of 0.01; int8 rounds weight deltas of 0.01 by up to 1/254 of them.
        torch.testing.assert_close(found, expected, atol=1.5e-3, rtol=0)
    exchange.flush()
    distance = max(float((a - b).abs().max()) for a, b in zip(parameters, reference, strict=True))
    assert distance > 5e-3  # the fourth update
    exchange.close()


def _skip_on_one(rank: int, world_size: int, config: ExchangeConfig) -> dict[str, Any]:
    """Two steps, the second with a NaN on rank 1, then a third."""
    parameters = build_parameters()
    exchange = build_exchange(config)
    exchange.setup(parameters, CollectiveTransport(timeout_s=TIMEOUT_S), build_rule())
    rows = rows_of(rank, world_size)
    take_step(exchange, parameters, rows)
    exchange.flush()
    before = {"weights": values_of(parameters), "state": exchange.state_dict()}
    for parameter in parameters:
        parameter.grad = None
    totals = backward(parameters, rows)
    if rank == 1:
        assert parameters[0].grad is not None
        parameters[0].grad[0, 0] = math.nan
    outcomes = [exchange.step(totals), exchange.flush()]
    after = {"weights": values_of(parameters), "state": exchange.state_dict()}
    take_step(exchange, parameters, rows)
    outcomes.append(exchange.flush())
    exchange.close()
    return {"before": before, "after": after, "outcomes": outcomes, "end": values_of(parameters)}


@pytest.mark.parametrize("config", [DELTA4, ASYNC], ids=lambda config: config.type)
def test_a_nan_on_one_worker_changes_nothing_on_any(config: ExchangeConfig) -> None:
    for result in run_ranks(_skip_on_one, 2, config):
        assert "skip" in [outcome.verdict for outcome in result["outcomes"]]
        before, after = _flatten(result["before"]), _flatten(result["after"])
        before.pop("state.num_steps")
        after.pop("state.num_steps")
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), name
        assert not torch.equal(result["end"][0], result["after"]["weights"][0])


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= _flatten(value, f"{prefix}{name}.")
    return flat


def _drift_on_one(rank: int, world_size: int) -> dict[str, Any]:
    """Rank 1's weights go astray after step 2; the comparison after step 4 finds it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("r1ray").addHandler(handler)
    parameters = build_parameters()
    exchange = build_exchange(Delta4ExchangeConfig(type="delta4", checksum_every_steps=4))
    exchange.setup(parameters, CollectiveTransport(timeout_s=TIMEOUT_S), build_rule())
    for step in range(5):
        take_step(exchange, parameters, rows_of(rank, world_size), step)
        if step == 1 and rank == 1:
            # As a flipped bit in its copy of the shared weights would.
            exchange._weights[3] += 1.0  # type: ignore[attr-defined]
    exchange.close()
    return {"weights": values_of(parameters), "messages": messages}


def test_weights_that_went_astray_are_found_and_replaced_by_the_owners() -> None:
    first, second = run_ranks(_drift_on_one, 2)
    for result in (first, second):
        assert len(result["messages"]) == 1
        assert "weights differ between workers after step 4" in result["messages"][0]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def _save_and_resume(rank: int, world_size: int, config: ExchangeConfig) -> dict[str, Any]:
    """Six steps with a flush after the third, straight and resumed from a copy after it."""
    rows = rows_of(rank, world_size)
    straight = build_parameters()
    transport = CollectiveTransport(timeout_s=TIMEOUT_S)
    exchange = build_exchange(config)
    exchange.setup(straight, transport, build_rule(6))
    for step in range(3):
        take_step(exchange, straight, rows, step)
    exchange.flush()
    saved = {"weights": values_of(straight), "state": exchange.state_dict()}
    for step in range(3, 6):
        take_step(exchange, straight, rows, step)
    exchange.flush()
    exchange.close()

    states: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(states, saved["state"])
    resumed = build_parameters()
    for parameter, value in zip(resumed, saved["weights"], strict=True):
        parameter.data.copy_(value)
    exchange = build_exchange(config)
    exchange.setup(resumed, transport, build_rule(6))
    exchange.load_state_dict(states)
    for step in range(3, 6):
        take_step(exchange, resumed, rows, step)
    exchange.flush()
    exchange.close()
    return {"straight": values_of(straight), "resumed": values_of(resumed), "saved": saved}


@pytest.fixture(scope="module")
def saved_runs() -> list[dict[str, Any]]:
    return run_ranks(_save_and_resume, 3, ASYNC)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    saved_runs: list[dict[str, Any]],
) -> None:
    for result in saved_runs:
        for found, expected in zip(result["resumed"], result["straight"], strict=True):
            assert torch.equal(found, expected)


def test_another_number_of_workers_continues_from_the_same_sums(
    saved_runs: list[dict[str, Any]],
) -> None:
    """One worker alone, from the states of three, goes on as the three would."""
    saved = [result["saved"] for result in saved_runs]
    parameters = build_parameters()
    for parameter, value in zip(parameters, saved[0]["weights"], strict=True):
        parameter.data.copy_(value)
    exchange = build_exchange(DELTA4)
    exchange.setup(parameters, LocalTransport(), build_rule(6))
    exchange.load_state_dict([item["state"] for item in saved])
    state = exchange.state_dict()
    for part in (0, 1):
        residuals = sum(item["state"]["residual"][part] for item in saved)
        torch.testing.assert_close(state["residual"][part], residuals)
        for name in ("master", "exp_avg", "exp_avg_sq"):
            joined = torch.cat([item["state"][name][part] for item in saved])
            numel = len(state["residual"][part])
            assert torch.equal(state[name][part][:numel], joined[:numel])
    assert exchange.num_updates == 3
    assert take_step(exchange, parameters, range(NUM_ROWS), 3).verdict == "apply"
    exchange.close()


def test_error_feedback_delivers_over_time_what_rounding_takes() -> None:
    """Sums of decoded gradients track sums of gradients to within one residual."""
    with_feedback, without = _accumulated_error(True), _accumulated_error(False)
    assert with_feedback < 0.25 * without


def _accumulated_error(error_feedback: bool) -> float:
    parameters = [torch.nn.Parameter(torch.zeros(16, 16))]
    exchange = build_exchange(
        Delta4ExchangeConfig(type="delta4", codec="int3", error_feedback=error_feedback)
    )
    exchange.setup(parameters, LocalTransport(), build_rule())
    seen: list[torch.Tensor] = []
    optimizer = exchange.optimizer  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(optimizer.param_groups[0]["params"][0].grad.clone())
    )
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(16, 16, generator=generator)
    sent = torch.zeros(16, 16)
    for _ in range(40):
        gradient = mean + 0.1 * torch.randn(16, 16, generator=generator)
        sent += gradient
        parameters[0].grad = gradient
        exchange.step(StepTotals(1.0, 1, 1))
    exchange.close()
    return float((sum(seen) - sent.flatten()).norm())


def test_a_step_without_a_target_is_an_error() -> None:
    exchange = build_exchange(DELTA4)
    exchange.setup(build_parameters(), LocalTransport(), build_rule())
    with pytest.raises(ExchangeError, match="no worker had a target token"):
        exchange.step(StepTotals(0.0, 0, 4))
    exchange.close()


def test_shards_cover_every_parameter_once() -> None:
    from r1ray.exchange.flat import FlatParameters

    parameters = build_parameters()
    for num_shards in range(1, 6):
        flat = FlatParameters(parameters, num_shards)
        values = flat.gather()
        shards = [flat.shard(values, index) for index in range(num_shards)]
        assert torch.equal(flat.join(shards), values)
        assert sum(part.numel() for part in itertools.chain(*shards)) == len(values)
        changed = build_parameters()
        for parameter in changed:
            parameter.data.zero_()
        FlatParameters(changed, num_shards).scatter(values)
        assert all(torch.equal(a, b) for a, b in zip(changed, parameters, strict=True))
