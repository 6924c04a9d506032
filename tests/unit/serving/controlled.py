"""An engine over a tiny decoder whose steps a test controls."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from r1ray.models.generation import BatchGenerator
from r1ray.models.grammar import FormCompiler
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.sampling import SamplingParams
from r1ray.serving.engine import Engine
from tests.fakes import tiny_model

__all__ = ["MODEL", "ControlledGenerator", "engine_with", "read", "request", "run", "until"]

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
