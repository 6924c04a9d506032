"""The engine with a tiny decoder: concurrency, cancelling and limits, without Ray."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from r1ray.errors import ServingError
from r1ray.models.batch_generation import generate_batch
from r1ray.models.grammar import FormCompiler, regex_form
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import EOS_ID, VOCAB_SIZE, write_tiny_model
from tests.unit.serving.controlled import (
    MODEL,
    ControlledGenerator,
    engine_with,
    read,
    request,
    run,
    until,
)


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
