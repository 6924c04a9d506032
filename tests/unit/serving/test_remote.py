"""A model's groups behind handles that stand for Serve's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayError

from r1ray.config.serving import GroupConfig, ModelArgs
from r1ray.errors import ServingError
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.speed import Speed
from r1ray.serving import remote
from r1ray.serving.remote import RemoteModel

FAST = Speed(((1, 0.01),), ((64, 0.0001),))
SLOW = Speed(((1, 0.1),), ((64, 0.002),))
REQUEST = GenerationRequest("r", [1, 2, 3], 3, frozenset())
BUSY = ServingError("busy", status=429, code="rate_limit_exceeded")
WRONG = ServingError("wrong", status=400)
LOST = ServingError("lost", status=503, code="service_unavailable")
Step = Any  # an item, a RayError to raise, or None to wait for ever


class _Response:
    """What a handle's streaming call returns."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps, self.was_cancelled = list(steps), False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self._steps:
            raise StopAsyncIteration
        step = self._steps.pop(0)
        if step is None:
            await asyncio.Event().wait()
        await asyncio.sleep(0.001)  # it comes from elsewhere
        if isinstance(step, RayError):
            raise step
        return step

    def cancel(self) -> None:
        self.was_cancelled = True


class _Handle:
    """Attributes:
    speeds: what its replicas say; none for a group that is gone.
    """

    def __init__(self, name: str, *speeds: Speed, steps: Sequence[Step] | None = None) -> None:
        self.speeds: list[Speed] = list(speeds)
        answer = [[TokenEvent("r", ord(name[0]), None)], [TokenEvent("r", 0, "length")]]
        self._steps: Sequence[Step] = answer if steps is None else steps
        self.responses: list[_Response] = []
        self.contexts: list[str] = []  # of who asked
        self.probe = SimpleNamespace(remote=self._probe)

    def options(self, **_: Any) -> Any:
        return SimpleNamespace(generate=SimpleNamespace(remote=self._generate))

    def _generate(self, request: GenerationRequest) -> _Response:
        self.responses.append(_Response(self._steps))
        return self.responses[-1]

    def broadcast(self, method: str) -> Any:
        async def results(*, return_exceptions: bool) -> list[Speed]:
            assert return_exceptions
            self.contexts.append(CALLER.get())
            if not self.speeds:
                raise RayError("there is no replica")
            return self.speeds

        return SimpleNamespace(results_async=results)

    async def _probe(self) -> None:
        if not self.speeds:
            raise RayError("there is no replica")


CALLER = ContextVar("CALLER", default="nobody")


@pytest.fixture(autouse=True)
def _asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ASK_EVERY_S", 0.01)


def run(tmp_path: Path, body: Callable[[RemoteModel], Any], **handles: _Handle) -> Any:
    groups = [GroupConfig(name=name) for name in handles]
    args = ModelArgs(model_name="tiny", model_dir=str(tmp_path), groups=groups)

    async def main() -> Any:
        return await body(RemoteModel(cast(Any, handles), args))

    return asyncio.run(main())


async def read(model: RemoteModel) -> list[int | None]:
    return [event.token_id async for events in model.generate(REQUEST) for event in events]


def test_the_fast_group_answers(tmp_path: Path) -> None:
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST)
    assert run(tmp_path, read, slow=slow, fast=fast) == [ord("f"), 0]
    assert not slow.responses


@pytest.mark.parametrize("first", [BUSY, RayError("it died")])
def test_what_is_refused_or_lost_before_its_first_token_goes_elsewhere(
    tmp_path: Path, first: Step
) -> None:
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST, steps=[first])
    assert run(tmp_path, read, slow=slow, fast=fast) == [ord("s"), 0]
    assert fast.responses[0].was_cancelled


def test_what_waits_at_a_group_that_is_gone_goes_elsewhere(tmp_path: Path) -> None:
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST, steps=[None])

    async def body(model: RemoteModel) -> list[int | None]:
        answer = asyncio.create_task(read(model))
        await asyncio.sleep(0.05)
        assert fast.responses
        assert not answer.done()
        fast.speeds.clear()
        return await answer

    assert run(tmp_path, body, slow=slow, fast=fast) == [ord("s"), 0]
    assert fast.responses[0].was_cancelled


def test_an_answer_that_has_begun_is_not_begun_again(tmp_path: Path) -> None:
    steps = [[TokenEvent("r", 7, None)], RayError("it died")]
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST, steps=steps)
    with pytest.raises(ServingError, match="the model replica was lost") as caught:
        run(tmp_path, read, slow=slow, fast=fast)
    assert caught.value.status == 503
    assert not slow.responses


@pytest.mark.parametrize(("failure", "num_asked"), [(WRONG, 1), (BUSY, 2)])
def test_errors_that_stay_are_passed_on(
    tmp_path: Path, failure: ServingError, num_asked: int
) -> None:
    slow = _Handle("slow", SLOW, steps=[failure])
    fast = _Handle("fast", FAST, steps=[failure])
    with pytest.raises(ServingError, match=str(failure)):
        run(tmp_path, read, slow=slow, fast=fast)
    assert len(slow.responses) + len(fast.responses) == num_asked


def test_a_refusal_is_passed_on_without_waiting_for_a_group_that_is_gone(tmp_path: Path) -> None:
    fast = _Handle("fast", FAST, steps=[BUSY])
    gone = _Handle("gone", steps=[None])
    with pytest.raises(ServingError, match="busy"):
        run(tmp_path, read, gone=gone, fast=fast)
    assert not gone.responses


def test_a_refusal_is_not_hidden_by_one_that_fails(tmp_path: Path) -> None:
    fast, other = _Handle("fast", FAST, steps=[BUSY]), _Handle("other", SLOW, steps=[LOST])
    with pytest.raises(ServingError, match="busy"):
        run(tmp_path, read, other=other, fast=fast)
    assert other.responses


def test_a_group_that_only_seems_gone_answers_when_others_are_lost(tmp_path: Path) -> None:
    fast = _Handle("fast", FAST, steps=[LOST])
    silent = _Handle("silent")
    assert run(tmp_path, read, silent=silent, fast=fast) == [ord("s"), 0]


def test_a_group_without_replicas_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PROBE_TIMEOUT_S", 0.05)
    fast, silent = _Handle("fast", FAST, steps=[LOST]), _Handle("silent", steps=[None])
    with pytest.raises(ServingError, match="lost"):
        run(tmp_path, read, silent=silent, fast=fast)
    assert silent.responses[0].was_cancelled


def test_a_group_that_has_lost_one_of_its_replicas_goes_on(tmp_path: Path) -> None:
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST, cast(Any, RayError("it died")))
    assert run(tmp_path, read, slow=slow, fast=fast) == [ord("f"), 0]
    fast.speeds = cast(Any, [RayError("it died"), ("replica-1", ["metric"])])
    [(labels, _)] = run(tmp_path, lambda model: model.read_metrics(), fast=fast)
    assert labels["replica"] == "replica-1"


def test_what_asks_the_groups_is_no_part_of_a_request(tmp_path: Path) -> None:
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST)

    async def body(model: RemoteModel) -> None:
        CALLER.set("the first request")
        await read(model)

    run(tmp_path, body, slow=slow, fast=fast)
    assert set(slow.contexts + fast.contexts) == {"nobody"}


def test_who_stops_reading_cancels_the_call(tmp_path: Path) -> None:
    slow, fast = _Handle("slow", SLOW), _Handle("fast", FAST)

    async def body(model: RemoteModel) -> None:
        async with aclosing(model.generate(REQUEST)) as batches:
            await anext(batches)

    run(tmp_path, body, slow=slow, fast=fast)
    assert fast.responses[0].was_cancelled


def test_a_model_is_healthy_while_any_group_is(tmp_path: Path) -> None:
    run(tmp_path, lambda model: model.probe(), gone=_Handle("gone"), fast=_Handle("fast", FAST))


def test_metrics_name_the_groups_that_answer(tmp_path: Path) -> None:
    fast, gone = _Handle("fast"), _Handle("gone")
    fast.speeds = cast(Any, [("replica-1", ["metric"])])
    found = run(tmp_path, lambda model: model.read_metrics(), fast=fast, gone=gone)
    labels = {"model_name": "tiny", "group": "fast", "replica": "replica-1"}
    assert found == [(labels, ["metric"])]
