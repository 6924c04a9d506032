"""What an engine does when steps fail or hang, and when it ends, without Ray."""

import asyncio
import weakref
from collections.abc import AsyncIterator

import pytest
import torch

from r1ray.errors import ServingError
from r1ray.models.requests import TokenEvent
from r1ray.serving import engine as engine_module
from r1ray.serving.engine import Engine
from tests.unit.serving.controlled import (
    MODEL,
    ControlledGenerator,
    engine_with,
    read,
    request,
    run,
    until,
)


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
