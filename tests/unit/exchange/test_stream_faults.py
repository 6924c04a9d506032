"""Workers of a streaming run that fail, hang, are slow or differ: real TCP on loopback."""

import time

import pytest

from r1ray.errors import ExchangeError
from tests.unit.exchange.stream_worker import NUM_STEPS, Worker, stream_config
from tests.unit.exchange.threads import ThreadTransport, run_workers


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_a_worker_that_fails_is_named_by_the_others() -> None:
    def work(transport: ThreadTransport) -> None:
        worker = Worker(transport, stream_config())
        try:
            if worker.rank == 1:
                worker.run(0, 5)
                raise RuntimeError("out of memory")
            worker.run(0, NUM_STEPS)
        finally:
            worker.exchange.close()

    errors = run_workers(3, work)
    assert isinstance(errors[1], RuntimeError)
    assert any("rank 1" in str(errors[rank]) for rank in (0, 2))  # the third may see the second go
    assert all(isinstance(errors[rank], ExchangeError) for rank in (0, 2))


def test_a_worker_that_hangs_is_named_after_the_timeout() -> None:
    def work(transport: ThreadTransport) -> None:
        worker = Worker(transport, stream_config(grace_s=0.05, timeout_s=0.4))
        try:
            worker.run(0, 3 if worker.rank == 1 else NUM_STEPS)
            time.sleep(2.0)
        finally:
            worker.exchange.close()

    started = time.monotonic()
    errors = run_workers(3, work)
    assert errors[1] is None
    assert any(
        "rank 1 has not answered, and no worker has made a step, for 0.4 s" in str(errors[rank])
        for rank in (0, 2)
    )
    assert time.monotonic() - started < 5.0


def test_a_slow_worker_is_waited_for_beyond_the_timeout() -> None:
    """The last merge waits for all of its steps, 1.6 s; each of them is news."""

    def work(transport: ThreadTransport) -> None:
        worker = Worker(transport, stream_config(grace_s=0.05, timeout_s=0.4, tail_share=0), 16)
        try:
            for step in range(16):
                time.sleep(0.1 if worker.rank == 1 else 0.0)
                worker.run(step, step + 1)
            worker.exchange.flush()
        finally:
            worker.exchange.close()

    assert run_workers(2, work) == [None, None]


def test_global_weights_that_differ_are_found_at_the_next_flush() -> None:
    def work(transport: ThreadTransport) -> None:
        worker = Worker(transport, stream_config())
        worker.run(0, 9)
        if worker.rank == 1:
            worker.exchange._copies[0].global_E[3] += 1e-6
        try:
            worker.exchange.flush()
        finally:
            worker.exchange.close()

    errors = run_workers(2, work)
    assert all(isinstance(error, Exception) for error in errors)
    # Who finds it first ends the other's last collective, at times before that has seen it too.
    assert any("global weights differ" in str(error) for error in errors)
