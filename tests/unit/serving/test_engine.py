"""The engine with a tiny decoder: concurrency, cancelling, limits and failures, without Ray."""

import asyncio
import dataclasses
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from r1ray.errors import ServingError
from r1ray.models.batch_generation import generate_batch
from r1ray.models.generation import BatchGenerator
from r1ray.models.grammar import FormCompiler, regex_form
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.sampling import SamplingParams
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving import engine as engine_module
from r1ray.serving.engine import Engine
from tests.fakes import EOS_ID, VOCAB_SIZE, tiny_model, write_tiny_model

MODEL = tiny_model()


class ControlledGenerator(BatchGenerator):
    """A generator whose steps wait for a gate, and fail when told to."""

    def __init__(self) -> None:
        super().__init__(MODEL, max_concurrency=2, max_context_tokens=128)
        self.gate = threading.Event()
        self.gate.set()
        self.fails_with: int | None = None  # so many running requests, or more

    def step(self) -> list[TokenEvent]:
        assert self.gate.wait(timeout=20)
        if self.fails_with is not None and self.num_running >= self.fails_with:
            raise RuntimeError("made to fail")
        return super().step()


@contextmanager
def engine_with(
    built: list[ControlledGenerator] | None = None,
    *,
    max_queued_requests: int = 8,
    forms: FormCompiler | None = None,
) -> Iterator[Engine]:
    built = [] if built is None else built

    def build() -> ControlledGenerator:
        built.append(ControlledGenerator())
        return built[-1]

    engine = Engine(build, max_concurrency=2, max_queued_requests=max_queued_requests, forms=forms)
    try:
        yield engine
    finally:
        built[-1].gate.set()
        engine.close()


def request(name: str, *, max_new_tokens: int = 12, **sampling: Any) -> GenerationRequest:
    prompt_ids = [5 + byte % 250 for byte in name.encode()]
    return GenerationRequest(
        name, prompt_ids, max_new_tokens, frozenset(), SamplingParams(**sampling)
    )


async def read(engine: Engine, item: GenerationRequest) -> list[int]:
    async with aclosing(engine.submit(item)) as batches:
        events = [event async for batch in batches for event in batch]
    assert events[-1].finish_reason == "length"
    return [event.token_id for event in events if event.token_id is not None]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in 10 s"
        await asyncio.sleep(0.005)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, timeout=30))


def test_concurrent_requests_get_the_tokens_they_get_alone() -> None:
    items = [request("x" * (1 + 7 * index), max_new_tokens=5 + index) for index in range(6)]

    async def main() -> None:
        with engine_with() as engine:
            together = await asyncio.gather(*(read(engine, item) for item in items))
        for item, tokens in zip(items, together, strict=True):
            [alone] = generate_batch(
                MODEL,
                [item.prompt_ids],
                max_new_tokens=item.max_new_tokens,
                stop_token_ids=frozenset(),
                max_concurrency=1,
            )
            assert tokens == alone

    run(main())


def test_seed_reproduces_a_sample_whatever_runs_beside_it() -> None:
    async def main() -> None:
        with engine_with() as engine:
            alone = await read(engine, request("a", temperature=1.0, seed=7))
            beside, _ = await asyncio.gather(
                read(engine, request("a", temperature=1.0, seed=7)),
                read(engine, request("b", temperature=1.0)),
            )
            other = await read(engine, request("a", temperature=1.0, seed=8))
        assert alone == beside != other

    run(main())


def test_a_slow_reader_gets_all_tokens_at_once() -> None:
    async def main() -> None:
        with engine_with() as engine:
            batches = engine.submit(request("slow", max_new_tokens=6))
            num_first = len(await anext(batches))
            await until(lambda: engine.stats.num_running == 0)
            await asyncio.sleep(0.05)  # what the engine's thread handed over arrives
            rest = [len(batch) async for batch in batches]
            assert rest == ([6 - num_first] if num_first < 6 else [])  # a loaded machine is slow

    run(main())


@pytest.mark.parametrize("how", ["close the iterator", "cancel the task"])
def test_leaving_a_stream_frees_its_row(how: str) -> None:
    async def main() -> None:
        with engine_with() as engine:
            if how == "close the iterator":
                batches = engine.submit(request("left", max_new_tokens=100))
                await anext(batches)
                await batches.aclose()
            else:
                task = asyncio.create_task(read(engine, request("left", max_new_tokens=100)))
                await until(lambda: engine.stats.num_running == 1)
                task.cancel()
            await until(lambda: engine.stats.num_running == 0 and engine.num_open == 0)
            assert len(await read(engine, request("next"))) == 12

    run(main())


def test_cancelled_while_waiting_never_runs() -> None:
    built: list[ControlledGenerator] = []

    async def main() -> None:
        with engine_with(built) as engine:
            built[0].gate.clear()
            running = [asyncio.create_task(read(engine, request(name))) for name in "ab"]
            waiting = asyncio.create_task(read(engine, request("w", max_new_tokens=100)))
            await until(lambda: engine.num_open == 3)
            waiting.cancel()
            await until(lambda: engine.num_open == 2)
            built[0].gate.set()
            await asyncio.gather(*running)
            assert engine.stats.num_running == 0

    run(main())


def test_full_queue_is_refused_with_429_and_accepts_again() -> None:
    built: list[ControlledGenerator] = []

    async def main() -> None:
        with engine_with(built, max_queued_requests=1) as engine:
            built[0].gate.clear()
            accepted = [asyncio.create_task(read(engine, request(name))) for name in "abc"]
            await until(lambda: engine.num_open == 3)
            with pytest.raises(ServingError, match="2 requests are running and 1") as caught:
                await read(engine, request("d"))
            assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
            built[0].gate.set()
            await asyncio.gather(*accepted)
            assert len(await read(engine, request("d"))) == 12

    run(main())


def test_failed_step_fails_the_running_requests_and_no_others() -> None:
    built: list[ControlledGenerator] = []

    async def main() -> None:
        with engine_with(built) as engine:
            built[0].gate.clear()
            running = [asyncio.create_task(read(engine, request(name))) for name in "ab"]
            await until(lambda: engine.num_open == 2)
            waiting = asyncio.create_task(read(engine, request("w")))
            await until(lambda: engine.num_open == 3)
            built[0].fails_with = 2
            built[0].gate.set()
            errors = await asyncio.gather(*running, return_exceptions=True)
            assert [getattr(error, "status", None) for error in errors] == [500, 500]
            expected = await read(engine, request("w2", max_new_tokens=3))
            assert len(expected) == 3
            assert len(await waiting) == 12
            assert len(built) == 2
            assert engine.is_alive

    run(main())


def test_a_probe_is_answered_by_the_model_itself() -> None:
    built: list[ControlledGenerator] = []

    async def main() -> None:
        with engine_with(built) as engine:
            await engine.probe()
            built[0].gate.clear()
            running = asyncio.create_task(read(engine, request("a")))
            await until(lambda: engine.num_open == 1)
            await asyncio.sleep(0.05)  # the engine is inside its step
            probe = asyncio.create_task(engine.probe())
            with pytest.raises(TimeoutError):  # a step that hangs is seen
                await asyncio.wait_for(asyncio.shield(probe), 0.1)
            built[0].gate.set()
            await probe
            assert len(await running) == 12
            with torch.no_grad():
                kept = MODEL.model.norm.weight.clone()
                MODEL.model.norm.weight.fill_(float("nan"))
            try:
                with pytest.raises(ServingError, match="the model failed"):
                    await engine.probe()
            finally:
                with torch.no_grad():
                    MODEL.model.norm.weight.copy_(kept)
            await engine.probe()
            engine.close()
            with pytest.raises(ServingError, match="shut down"):
                await engine.probe()

    run(main())


def test_metrics_count_what_was_asked_and_answered() -> None:
    async def main() -> None:
        with engine_with() as engine:
            await asyncio.gather(*[read(engine, request("x" * 70 + name)) for name in "abc"])
            with pytest.raises(ServingError):
                await read(engine, request("long", max_new_tokens=500))
            await until(lambda: engine.stats.num_running == 0)
            found = {
                (sample.name, *sample.labels.values()): sample.value
                for family in engine.metrics()
                for sample in family.samples
            }
        assert found["r1ray:prompt_tokens_total",] == 3 * 71
        assert found["r1ray:generation_tokens_total",] == 3 * 12
        assert found["r1ray:prefix_cache_hits_total",] == 64  # two are read at the same time
        assert found["r1ray:request_success_total", "length"] == 3
        assert found["r1ray:request_failure_total", "400"] == 1
        assert found["r1ray:time_to_first_token_seconds_count",] == 3
        assert found["r1ray:inter_token_latency_seconds_count",] == 3 * 11
        assert found["r1ray:e2e_request_latency_seconds_count",] == 3
        assert found["r1ray:kv_cache_usage_perc",] == 0

    run(main())


def test_a_request_that_takes_too_long_is_ended_and_others_are_not() -> None:
    built: list[ControlledGenerator] = []

    async def main() -> None:
        def build() -> ControlledGenerator:
            built.append(ControlledGenerator())
            return built[-1]

        engine = Engine(build, max_concurrency=2, max_queued_requests=8, timeout_s=0.2)
        built[0].gate.clear()
        late = [asyncio.create_task(read(engine, request(name))) for name in "abc"]
        await until(lambda: engine.num_open == 3)
        await asyncio.sleep(0.3)
        soon = asyncio.create_task(read(engine, request("d")))
        await until(lambda: engine.num_open == 4)
        built[0].gate.set()
        errors = await asyncio.gather(*late, return_exceptions=True)
        assert [getattr(error, "status", None) for error in errors] == [504] * 3
        assert len(await soon) == 12
        await until(lambda: engine.stats.num_running == 0)
        engine.close()

    run(main())


def test_request_that_does_not_fit_fails_alone() -> None:
    async def main() -> None:
        with engine_with() as engine:
            with pytest.raises(ServingError, match="exceed the context of 128") as caught:
                await read(engine, request("long", max_new_tokens=500))
            assert caught.value.status == 400
            assert len(await read(engine, request("short"))) == 12

    run(main())


def test_a_form_is_compiled_while_a_step_is_under_way(tmp_path: Path) -> None:
    forms = FormCompiler(
        Tokenizer(write_tiny_model(tmp_path)), vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID]
    )
    built: list[ControlledGenerator] = []

    async def main() -> None:
        with engine_with(built, forms=forms) as engine:
            built[0].gate.clear()
            reading = asyncio.create_task(read(engine, request("a")))
            await until(lambda: engine.num_open == 1)
            wrong = dataclasses.replace(request("b"), form=regex_form("[a-"))
            with pytest.raises(ServingError, match="no such form") as caught:
                await read(engine, wrong)
            assert caught.value.status == 400
            assert not reading.done()
            built[0].gate.set()
            assert len(await reading) == 12

    run(main())


def test_a_full_engine_refuses_before_it_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = FormCompiler(
        Tokenizer(write_tiny_model(tmp_path)), vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID]
    )
    compiled: list[str] = []
    monkeypatch.setattr(forms, "start", compiled.append)
    built: list[ControlledGenerator] = []

    async def main() -> None:
        with engine_with(built, forms=forms, max_queued_requests=0) as engine:
            built[0].gate.clear()
            reading = [asyncio.create_task(read(engine, request(name))) for name in "ab"]
            await until(lambda: engine.num_open == 2)
            with pytest.raises(ServingError) as caught:
                await read(engine, dataclasses.replace(request("c"), form=regex_form("c")))
            assert caught.value.status == 429
            built[0].gate.set()
            await asyncio.gather(*reading)
        assert not compiled

    run(main())


def test_close_fails_open_requests_and_refuses_new_ones() -> None:
    async def main() -> None:
        with engine_with() as engine:
            batches: AsyncIterator[list[TokenEvent]] = engine.submit(
                request("open", max_new_tokens=120)
            )
            await anext(batches)
            engine.close()
            engine.close()
            assert not engine.is_alive
            with pytest.raises(ServingError, match="shut down") as caught:
                async for _ in batches:
                    pass
            assert caught.value.status == 503
            with pytest.raises(ServingError, match="shut down"):
                await read(engine, request("late"))

    run(main())


def test_a_failed_model_is_gone_before_its_successor_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module.logger, "exception", print)  # pytest keeps what is logged
    built: list[weakref.ref[ControlledGenerator]] = []
    left: list[ControlledGenerator | None] = []

    def build() -> ControlledGenerator:
        left.extend(ref() for ref in built)  # whose cache would be beside the next one's
        generator = ControlledGenerator()
        generator.fails_with = 0 if not built else None
        built.append(weakref.ref(generator))
        return generator

    async def main() -> None:
        engine = Engine(build, max_concurrency=2, max_queued_requests=1)
        try:
            with pytest.raises(ServingError):
                await read(engine, request("a"))
            assert len(await read(engine, request("b"))) == 12
        finally:
            engine.close()

    run(main())
    assert left == [None]


def test_dead_thread_is_seen_and_answers_503() -> None:
    built: list[ControlledGenerator] = []

    async def main() -> None:
        def build() -> ControlledGenerator:
            if built:
                raise MemoryError("no room for another cache")
            built.append(ControlledGenerator())
            built[0].fails_with = 0
            return built[0]

        engine = Engine(build, max_concurrency=2, max_queued_requests=1)
        with pytest.raises(ServingError):
            await read(engine, request("a"))
        await until(lambda: not engine.is_alive)
        with pytest.raises(ServingError, match="shut down") as caught:
            await read(engine, request("b"))
        assert caught.value.status == 503

    run(main())
