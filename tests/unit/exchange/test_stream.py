"""Whole streaming runs between threads: real TCP on loopback, collectives between threads."""

import logging
import threading
import time
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r1ray.config.exchange import StreamExchangeConfig
from r1ray.exchange.base import StepTotals
from r1ray.exchange.stream import StreamExchange
from r1ray.exchange.update_rule import UpdateRule
from tests.unit.exchange.stream_worker import NUM_STEPS, Worker, results_of, stream_config
from tests.unit.exchange.threads import ThreadTransport


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def _all_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


@pytest.mark.parametrize("changes", [{}, {"tail_share": 0.0}, {"overlap_steps": 0}])
@pytest.mark.parametrize("world_size", [1, 3])
def test_loss_falls_and_all_weights_end_bit_identical(
    world_size: int, changes: dict[str, Any]
) -> None:
    def work(transport: ThreadTransport) -> tuple[list[float], Tensor, int]:
        worker = Worker(transport, stream_config(**changes))
        worker.run(0, NUM_STEPS)
        worker.exchange.flush()
        worker.close()
        return worker.losses, worker.weights(), worker.exchange.num_updates

    losses, weights, num_updates = zip(*results_of(world_size, work), strict=True)
    assert _all_equal(list(weights))
    assert set(num_updates) == {NUM_STEPS}
    for worker_losses in losses:
        assert sum(worker_losses[-5:]) < 0.5 * sum(worker_losses[:5])


def test_local_weights_differ_between_merges_and_the_tail_keeps_them_equal() -> None:
    def work(transport: ThreadTransport) -> list[Tensor]:
        worker = Worker(transport, stream_config())
        found = []
        for step in range(NUM_STEPS):
            worker.run(step, step + 1)
            found.append(worker.weights())
        worker.close()
        return found

    steps = [_all_equal(list(weights)) for weights in zip(*results_of(3, work), strict=True)]
    assert steps == [False] * 35 + [True] * 5  # the 36th ends with the merge of everything


def test_the_result_does_not_depend_on_who_is_fast() -> None:
    def run(late_rank: int) -> Tensor:
        def work(transport: ThreadTransport) -> Tensor:
            worker = Worker(transport, stream_config())
            late_s = 0.02 if worker.rank == late_rank else 0.0
            worker.run(0, NUM_STEPS, lambda step: time.sleep(late_s))
            worker.close()
            return worker.weights()

        return results_of(3, work)[0]

    assert torch.equal(run(late_rank=0), run(late_rank=2))


def test_the_others_go_on_without_a_stalled_worker(caplog: pytest.LogCaptureFixture) -> None:
    others_went_on = threading.Event()

    def was_left_out() -> bool:
        texts = [record.getMessage() for record in caplog.records]
        return any("version 0: merged without ranks [2]" in text for text in texts)

    def work(transport: ThreadTransport) -> Tensor:
        worker = Worker(transport, stream_config(grace_s=0.05, tail_share=0.0))

        def stall(step: int) -> None:
            if (worker.rank, step) == (2, 3):
                assert others_went_on.wait(10.0)  # it has sent nothing yet
                deadline = time.monotonic() + 10.0
                while not was_left_out() and time.monotonic() < deadline:
                    time.sleep(0.01)
            if (worker.rank, step) == (0, 8):
                others_went_on.set()

        worker.run(0, NUM_STEPS, stall)
        worker.close()
        return worker.weights()

    with caplog.at_level(logging.WARNING):
        assert _all_equal(results_of(3, work))
    assert was_left_out()


def test_what_a_stalled_worker_learned_is_not_lost() -> None:
    """One worker's gradients alone, always late, still arrive in the common weights."""

    def work(transport: ThreadTransport) -> Tensor:
        worker = Worker(transport, stream_config(grace_s=0.02, tail_share=0.0, outer_momentum=0.0))
        start = worker.weights()
        for step in range(NUM_STEPS):
            totals = worker.backward(step)
            if worker.rank < 2:
                worker.model.zero_grad(set_to_none=False)
            elif step < 24:
                time.sleep(0.02)
            worker.exchange.step(totals)
        worker.close()
        return worker.weights() - start

    def alone(transport: ThreadTransport) -> Tensor:
        worker = Worker(transport, stream_config(tail_share=0.0, outer_momentum=0.0))
        worker.rank = 2
        start = worker.weights()
        worker.run(0, NUM_STEPS)
        return worker.weights() - start

    moved = results_of(3, work)[0]
    learned = results_of(1, alone)[0]
    # A mean over three workers of which one learned, weighted by tokens: 20 of 48.
    cosine = torch.cosine_similarity(moved, learned, dim=0)
    assert cosine > 0.9
    assert moved.norm() > 0.2 * learned.norm()


def test_a_gradient_that_is_not_finite_is_left_out_by_its_worker_alone() -> None:
    def work(transport: ThreadTransport) -> tuple[list[str], Tensor]:
        worker = Worker(transport, stream_config())
        verdicts = []
        for step in range(NUM_STEPS):
            totals = worker.backward(step)
            if worker.rank == 1 and step == 5:
                gradient = worker.model[0].weight.grad
                assert isinstance(gradient, Tensor)
                gradient[0, 0] = float("nan")
            verdicts.append(worker.exchange.step(totals).verdict)
        worker.close()
        return verdicts, worker.weights()

    results = results_of(3, work)
    expected = ["apply"] * NUM_STEPS
    assert results[0][0] == results[2][0] == expected
    assert results[1][0] == [*expected[:5], "skip", *expected[6:]]
    assert _all_equal([weights for _, weights in results])
    assert torch.isfinite(results[0][1]).all()


def test_a_worker_without_targets_waits() -> None:
    def work(transport: ThreadTransport) -> str:
        worker = Worker(transport, stream_config())
        before = worker.weights()
        verdict = worker.exchange.step(StepTotals())
        assert torch.equal(worker.weights(), before)
        worker.close()
        return verdict.verdict

    assert results_of(1, work) == ["wait"]


def _resume(
    transport: ThreadTransport, states: list[dict[str, Any]], model: dict[str, Tensor]
) -> Worker:
    """As a checkpoint is loaded: rank 0's weights, then the exchange's states of all ranks."""
    worker = Worker(transport, stream_config())
    worker.model.load_state_dict(model)
    worker.exchange.load_state_dict(states)
    return worker


@pytest.mark.parametrize("at_step", [13, 20, 38])
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_on(at_step: int) -> None:
    def work(transport: ThreadTransport) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
        worker = Worker(transport, stream_config())
        worker.run(0, at_step)
        worker.exchange.flush()
        state = deepcopy(worker.exchange.state_dict())  # as saving it does
        model = deepcopy(worker.model.state_dict())
        worker.run(at_step, NUM_STEPS)
        worker.close()
        return state, model, worker.weights()

    states, models, weights = zip(*results_of(3, work), strict=True)

    def work_again(transport: ThreadTransport) -> Tensor:
        worker = _resume(transport, list(states), models[0])
        assert worker.exchange.num_updates == at_step
        worker.run(at_step, NUM_STEPS)
        worker.close()
        return worker.weights()

    assert _all_equal([weights[0], *results_of(3, work_again)])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_another_number_of_workers_resumes_from_the_global_weights(world_size: int) -> None:
    def work(transport: ThreadTransport) -> tuple[dict[str, Any], dict[str, Tensor]]:
        worker = Worker(transport, stream_config())
        worker.run(0, 20)
        worker.exchange.flush()
        found = deepcopy((worker.exchange.state_dict(), worker.model.state_dict()))
        worker.close()
        return found

    states, models = zip(*results_of(3, work), strict=True)

    def work_again(transport: ThreadTransport) -> tuple[Tensor, dict[str, Any], Tensor, float]:
        worker = _resume(transport, list(states), models[0])
        resumed, state = worker.weights(), worker.exchange.state_dict()
        worker.run(20, NUM_STEPS)
        worker.close()
        return resumed, state, worker.weights(), sum(worker.losses[-5:]) / 5

    resumed, new_states, weights, losses = zip(*results_of(world_size, work_again), strict=True)
    assert _all_equal(list(resumed))
    assert _all_equal(list(weights))
    assert max(losses) < 1.0
    for name in ("momentum", "unsent"):
        for fragment in range(2):
            before = torch.cat([state["owner"][name][fragment] for state in states])
            after = torch.cat([state["owner"][name][fragment] for state in new_states])
            assert torch.equal(before, after)
            assert before.any()


def test_bytes_at_100_local_steps_are_a_four_hundredth_of_ddp() -> None:
    num_workers, numel, local_steps = 4, 40_000, 100

    def work(transport: ThreadTransport) -> int:
        parameter = nn.Parameter(torch.zeros(100, numel // 100))
        exchange = StreamExchange(
            StreamExchangeConfig(type="stream", local_steps=local_steps, tail_share=0.0)
        )
        rule = UpdateRule(lambda number: 0.01, num_steps=1000)
        exchange.setup([parameter], transport, rule)
        generator = torch.Generator().manual_seed(transport.rank)
        noise = torch.randn(100, numel // 100, generator=generator)
        sent = []
        for _ in range(2):
            for _ in range(local_steps):
                parameter.grad = noise[torch.randperm(100, generator=generator)]
                exchange.step(StepTotals(1.0, 1, 1))
            exchange.flush()
            sent.append(exchange.stats().sent_bytes)
        transport.all_gather(torch.zeros(1))
        exchange.close()
        return sent[1] - sent[0]

    ddp = 2 * (num_workers - 1) / num_workers * 4 * numel * local_steps
    frames = 2 * (num_workers - 1) * 4  # both ways, to every other worker, of four fragments
    # A frame of some 1,300 bytes is one segment: IPv4, TCP and its options, and as much for an ack.
    headers = frames * 2 * (14 + 20 + 32)
    for sent in results_of(num_workers, work):
        assert sent + headers <= ddp / 400
        assert sent >= ddp / 1200  # not less than zstd can leave of 4 bits: all was sent
