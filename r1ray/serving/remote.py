"""A model's replicas behind Serve handles, one for each group, as the ingress wants to see them.

1. A request goes to the group that `r1ray.serving.group_choice` names; where it is lost or refused
   there before its first token, to another.
2. Where there are several groups, each is asked every second what its replicas have measured. One
   that does not answer is tried last, and what waits there is sent elsewhere.
"""

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

import grpc
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from r1ray.config.serving import ModelArgs, list_groups
from r1ray.errors import ServingError
from r1ray.models.answer_lengths import AnswerLengths, read_answer_lengths
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.speed import Speed
from r1ray.serving.group_choice import GroupBoard
from r1ray.serving.readiness import explain_waiting

__all__ = ["RemoteModel"]

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
ASK_EVERY_S = 1.0
_LOST = (RayError, RayServeException, TimeoutError, grpc.RpcError)  # Serve hands some on as it is
_FULL = 429
_ELSEWHERE = (_FULL, 503)  # statuses that another group may not have


class RemoteModel:
    """Args:
    handles: of the groups, by name.
    """

    def __init__(self, handles: Mapping[str | None, DeploymentHandle], args: ModelArgs) -> None:
        self._args = args
        self._groups = {name: _Group(handle) for name, handle in handles.items()}
        lengths = AnswerLengths(read_answer_lengths(args.model_dir))
        self._board = GroupBoard(list_groups(args), lengths)
        self._watchers: list[asyncio.Task[None]] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[TokenEvent]]:
        """The tokens of `request`; closing the iterator cancels it on the replica.

        Raises:
            ServingError: the one that the replica raised, or 503 when no replica answers.
        """
        await self._watch()
        refusal: ServingError | None = None
        for name in self._board.rank(request):
            is_full = refusal is not None and refusal.status == _FULL
            if is_full and self._groups[name].is_lost.is_set():
                continue  # who is to come again later need not wait now
            has_begun = False
            try:
                with self._board.give(name, request) as progress:
                    async with aclosing(self._groups[name].generate(request)) as batches:
                        async for events in batches:
                            has_begun = True
                            progress.note(events)
                            yield events
                return
            except ServingError as error:
                if has_begun or error.status not in _ELSEWHERE:
                    raise
                if refusal is None or error.status == _FULL:  # more is to be had there later
                    refusal = error
        assert refusal is not None, "a model has groups"
        raise refusal

    @property
    def name(self) -> str:
        """What requests call it."""
        return self._args.model_name

    async def probe(self) -> str:
        """The version that a replica serves, of any group, once its model has computed something.

        Raises:
            ServingError: 503 when none does in time, with the reason.
        """
        tasks = [asyncio.ensure_future(group.probe()) for group in self._groups.values()]
        try:
            for answer in asyncio.as_completed(tasks):
                if (version := await answer) is not None:
                    return version
        finally:
            for task in tasks:
                task.cancel()
        app_name = serve.get_replica_context().app_name
        reason = await asyncio.to_thread(explain_waiting, app_name, self._args)
        raise _unavailable(f"{self._args.model_name} does not answer: {reason}")

    async def read_metrics(self) -> list[tuple[dict[str, str], list[Metric]]]:
        """Of every replica, with labels that name it; empty where there is none."""
        answers = await asyncio.gather(
            *[group.ask("read_metrics") for group in self._groups.values()]
        )
        found = []
        for name, replicas in zip(self._groups, answers, strict=True):
            labels = {"model_name": self._args.model_name}
            if name is not None:
                labels["group"] = name
            found += [({**labels, "replica": replica}, read) for replica, read in replicas]
        return found

    async def _watch(self) -> None:
        """Begin to ask the groups, and wait until each was asked once, where there is a choice."""
        if len(self._groups) > 1:
            if not self._watchers:
                # In a context of their own: what they ask would be the first request's, and be
                # cancelled with it.
                self._watchers = [
                    asyncio.create_task(self._keep_asking(name), context=contextvars.Context())
                    for name in self._groups
                ]
            await asyncio.gather(*[group.was_asked.wait() for group in self._groups.values()])

    async def _keep_asking(self, name: str | None) -> None:
        group = self._groups[name]
        while True:
            try:
                speeds = await group.ask("read_speed")
            except Exception:
                logger.exception("group %s cannot be asked", name)
                speeds = []
            self._board.report(name, [speed for speed in speeds if isinstance(speed, Speed)])
            group.is_lost.clear() if speeds else group.is_lost.set()
            group.was_asked.set()
            await asyncio.sleep(ASK_EVERY_S)


class _Group:
    """Attributes:
    was_asked: what its replicas say is known.
    is_lost: none of them answered when they were asked last.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        # Ray's own pickle takes several times as long for what needs none of what it can do.
        self._generate = handle.options(stream=True, response_serialization="pickle").generate
        self.was_asked, self.is_lost = asyncio.Event(), asyncio.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[TokenEvent]]:
        response = cast(DeploymentResponseGenerator[Any], self._generate.remote(request))
        finished = False
        try:
            item = await self._first(response)
            while item is not None:
                if isinstance(item, ServingError):
                    raise item
                finished = item[-1].finish_reason is not None  # whoever asks may stop here
                yield item
                item = await anext(response, None)
            finished = True
        except (RayError, RayServeException, grpc.RpcError) as error:
            raise _unavailable("the model replica was lost") from error
        finally:
            if not finished:
                response.cancel()

    async def ask(self, method: str) -> list[Any]:
        """What replicas say, but those that are lost; nothing where one takes too long."""
        try:
            response = self._handle.broadcast(method)
            answers = response.results_async(return_exceptions=True)
            found = await asyncio.wait_for(answers, PROBE_TIMEOUT_S)
        except _LOST:
            return []
        return [answer for answer in found if not isinstance(answer, BaseException)]

    async def probe(self) -> str | None:
        """The version that a replica's model computes with; None where none does in time."""
        try:
            found = await asyncio.wait_for(_result(self._handle.probe.remote()), PROBE_TIMEOUT_S)
        except (*_LOST, ServingError):
            return None
        return str(found)

    async def _first(self, response: DeploymentResponseGenerator[Any]) -> Any:
        """The first item; Serve would let it wait for a replica that may never come again."""
        item = asyncio.ensure_future(anext(response, None))
        lost = asyncio.ensure_future(self._wait_until_lost())
        try:
            await asyncio.wait({item, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not item.done():
                raise _unavailable("the group's replicas are gone")
            return item.result()
        finally:
            item.cancel()
            lost.cancel()

    async def _wait_until_lost(self) -> None:
        """Who comes to a group that seems gone already gives it some time."""
        if self.is_lost.is_set():
            await asyncio.sleep(PROBE_TIMEOUT_S)
        await self.is_lost.wait()


def _unavailable(message: str) -> ServingError:
    return ServingError(f"{message}; try again later", status=503, code="service_unavailable")


async def _result(response: Any) -> Any:
    return await response
