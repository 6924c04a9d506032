"""delta4 and delta4_async, alone and over real gloo processes on loopback."""

import itertools
import logging
import math
from typing import Any

import pytest
import torch

from r1ray.config.exchange import (
    Delta4AsyncExchangeConfig,
    Delta4ExchangeConfig,
    DenseExchangeConfig,
    ExchangeConfig,
)
from r1ray.errors import ExchangeError
from r1ray.exchange import (
    LocalTransport,
    StepTotals,
    Transport,
    build_exchange,
)
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
from tests.unit.exchange.threads import ThreadTransport, run_workers

DELTA4 = Delta4ExchangeConfig(type="delta4")
ASYNC = Delta4AsyncExchangeConfig(type="delta4_async", sync_share=0.1)
NUM_STEPS = 20


def _loss_after(parameters: list[Any]) -> float:
    for parameter in parameters:
        parameter.grad = None
    return backward(parameters, range(NUM_ROWS)).loss_sum


def _train(transport: Transport, config: ExchangeConfig) -> dict[str, Any]:
    """Twenty steps on one batch; what every worker ends with."""
    parameters = build_parameters()
    exchange = build_exchange(config)
    exchange.setup(parameters, transport, build_rule(NUM_STEPS))
    rows = rows_of(transport.rank, transport.world_size)
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


def _train_all(
    transport: Transport, configs: dict[str, ExchangeConfig]
) -> dict[str, dict[str, Any]]:
    return {name: _train(transport, config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    configs = {"dense": DenseExchangeConfig(type="dense"), "delta4": DELTA4, "async": ASYNC}
    by_rank = run_ranks(_train_all, 3, configs)
    return {name: [results[name] for results in by_rank] for name in configs}


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


def test_a_stale_gradient_is_that_of_older_weights_moved_on_by_their_last_change() -> None:
    """By hand: a synchronous exchange that is fed gradients of such weights."""
    parameters, reference, older = build_parameters(), build_parameters(), build_parameters()
    stale = build_exchange(
        Delta4AsyncExchangeConfig(type="delta4_async", sync_share=0, adam_beta1=0.9)
    )
    stale.setup(parameters, LocalTransport(), build_rule())
    by_hand = build_exchange(DELTA4)
    by_hand.setup(reference, LocalTransport(), build_rule())
    changes = [torch.zeros_like(item) for item in reference]
    for step in range(5):
        take_step(stale, parameters, range(NUM_ROWS), step)
        for item in older:
            item.grad = None
        totals = backward(older, range(NUM_ROWS), step=step)
        before = values_of(reference)
        for item, source in zip(reference, older, strict=True):
            item.grad = source.grad
        by_hand.step(totals)
        for item, value, change in zip(older, before, changes, strict=True):
            item.data.copy_(value + change)
        changes = [now.detach() - then for now, then in zip(reference, before, strict=True)]
        for item, expected in zip(parameters, older, strict=True):
            torch.testing.assert_close(item, expected, rtol=1e-5, atol=1e-7)
            expected.data.copy_(item)  # a change is known to a last bit only
    stale.flush()
    assert all(torch.equal(a, b) for a, b in zip(parameters, reference, strict=True))
    stale.close()
    by_hand.close()


def _skip_on_one(transport: Transport, config: ExchangeConfig) -> dict[str, Any]:
    """Two steps, the second with a NaN on rank 1, then a third."""
    parameters = build_parameters()
    exchange = build_exchange(config)
    exchange.setup(parameters, transport, build_rule())
    rows = rows_of(transport.rank, transport.world_size)
    take_step(exchange, parameters, rows)
    exchange.flush()
    before = {"weights": values_of(parameters), "state": exchange.state_dict()}
    for parameter in parameters:
        parameter.grad = None
    totals = backward(parameters, rows)
    if transport.rank == 1:
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
    for result in run_workers(2, lambda transport: _skip_on_one(transport, config)):
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


def _drift_on_one(transport: Transport) -> list[torch.Tensor]:
    """Rank 1's weights go astray after step 2; the comparison after step 4 finds it."""
    parameters = build_parameters()
    exchange = build_exchange(Delta4ExchangeConfig(type="delta4", checksum_every_steps=4))
    exchange.setup(parameters, transport, build_rule())
    for step in range(5):
        take_step(exchange, parameters, rows_of(transport.rank, transport.world_size), step)
        if step == 1 and transport.rank == 1:
            # As a flipped bit in its copy of the shared weights would.
            exchange._weights[3] += 1.0  # type: ignore[attr-defined]
    exchange.close()
    return values_of(parameters)


def test_weights_that_went_astray_are_found_and_replaced_by_the_owners(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="r1ray")
    first, second = run_workers(2, _drift_on_one)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # one from each worker
    assert all("weights differ between workers after step 4" in text for text in messages)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _save_and_resume(transport: ThreadTransport, config: ExchangeConfig) -> dict[str, Any]:
    """Six steps with a flush after the third, straight and resumed from a copy after it."""
    rows = rows_of(transport.rank, transport.world_size)
    straight = build_parameters()
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

    states = transport.share(saved["state"])
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
    return run_workers(3, lambda transport: _save_and_resume(transport, ASYNC))


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
