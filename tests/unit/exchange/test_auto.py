"""`auto` measures, chooses and hands over, over two workers."""

from typing import Any

import pytest
import torch

from r1ray.config.exchange import (
    AutoExchangeConfig,
    DenseExchangeConfig,
    StreamExchangeConfig,
)
from r1ray.exchange import LocalTransport, Transport, auto, build_exchange
from tests.unit.exchange.problem import (
    NUM_ROWS,
    build_parameters,
    build_rule,
    rows_of,
    take_step,
    values_of,
)
from tests.unit.exchange.threads import run_workers

AUTO = AutoExchangeConfig(type="auto")


def _train(transport: Transport) -> dict[str, Any]:
    parameters = build_parameters()
    exchange = build_exchange(AUTO)
    exchange.setup(parameters, transport, build_rule(6))
    outcomes = [
        take_step(exchange, parameters, rows_of(transport.rank, transport.world_size))
        for _ in range(6)
    ]
    outcomes.append(exchange.flush())
    result = {
        "outcomes": outcomes,
        "plan": exchange.plan,
        "weights": values_of(parameters),
        "state": exchange.state_dict(),
        "stats": exchange.stats(),
    }
    exchange.close()
    return result


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return run_workers(2, _train)


def test_all_workers_choose_the_same_and_say_why(runs: list[dict[str, Any]]) -> None:
    assert runs[0]["plan"] == runs[1]["plan"]
    assert runs[0]["state"]["config"] == runs[1]["state"]["config"]
    assert f"-> {runs[0]['state']['config']['type']}" in runs[0]["plan"]


def test_the_first_update_covers_the_timed_steps_as_well(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        assert [item.verdict for item in run["outcomes"][:2]] == ["wait", "wait"]
        done = [item for item in run["outcomes"] if item.verdict == "apply"]
        assert done[0].totals.num_targets == 3 * NUM_ROWS
        assert sum(item.totals.num_targets for item in done) == 6 * NUM_ROWS


def test_workers_end_with_identical_bits(runs: list[dict[str, Any]]) -> None:
    pairs = zip(runs[0]["weights"], runs[1]["weights"], strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("num_fragments", [1, 4])
@pytest.mark.parametrize("checkpoint_after", [None, 1, 4])
def test_a_schedule_of_the_chosen_exchange_ends_with_the_run(
    checkpoint_after: int | None, num_fragments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming leaves the same weights everywhere only after its last merge."""
    stream = StreamExchangeConfig(
        type="stream", local_steps=4, num_fragments=num_fragments, overlap_steps=1, tail_share=0
    )
    monkeypatch.setattr(auto, "candidates", lambda _: [stream])

    def work(transport: Transport) -> list[torch.Tensor]:
        parameters = build_parameters()
        exchange = build_exchange(AUTO)
        exchange.setup(parameters, transport, build_rule(12))
        for step in range(12):
            take_step(exchange, parameters, rows_of(transport.rank, transport.world_size), step)
            if step + 1 == checkpoint_after:
                exchange.flush()
                assert exchange.state_dict()["config"]["type"] == "stream"
        exchange.flush()
        exchange.close()
        return values_of(parameters)

    first, second = run_workers(2, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_early_checkpoint_hastens_the_choice_and_loses_nothing() -> None:
    parameters = build_parameters()
    exchange = build_exchange(AUTO)
    exchange.setup(parameters, LocalTransport(), build_rule(6))
    assert take_step(exchange, parameters, range(NUM_ROWS)).verdict == "wait"
    outcome = exchange.flush()
    assert outcome.verdict == "apply"
    assert outcome.totals.num_targets == NUM_ROWS
    others = build_parameters()
    dense = build_exchange(DenseExchangeConfig(type="dense"))
    dense.setup(others, LocalTransport(), build_rule(6))
    assert outcome.grad_norm == pytest.approx(take_step(dense, others, range(NUM_ROWS)).grad_norm)
    assert exchange.state_dict()["config"]["type"] == "dense"  # one worker


def test_a_resumed_run_goes_on_with_what_was_chosen(runs: list[dict[str, Any]]) -> None:
    parameters = build_parameters()
    for parameter, value in zip(parameters, runs[0]["weights"], strict=True):
        parameter.data.copy_(value)
    exchange = build_exchange(AUTO)
    exchange.setup(parameters, LocalTransport(), build_rule(9))
    exchange.load_state_dict([run["state"] for run in runs])
    assert exchange.num_updates == 4
    take_step(exchange, parameters, range(NUM_ROWS))
    exchange.flush()
    assert exchange.num_updates == 5
    assert exchange.state_dict()["config"] == runs[0]["state"]["config"]
    exchange.close()
