"""Asynchronous access to one `BatchGenerator`, which a single thread of its own drives.

1. `submit` registers a request, in the caller's event loop, unless too many are open.
2. The engine thread takes commands (submit, cancel, probe, close), runs one step of the generator,
   which says who waits and who runs, and hands the step's tokens to the callers' loops.
3. A step that raises fails the requests that had begun, and only those: a fresh generator replaces
   it, since the state of the old one is unknown, and the others are added anew.

Price: a command waits for the step in progress; one wake-up of a caller's loop per step. Callers
that read slowly get several tokens at once, so the engine never waits for them.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from r1ray.errors import ServingError, ShapeError
from r1ray.models.generation import BatchGenerator
from r1ray.models.grammar import FormCompiler
from r1ray.models.requests import GenerationRequest, GeneratorStats, TokenEvent
from r1ray.models.speed import Speed, SpeedMeter
from r1ray.serving.engine_metrics import EngineMetrics
from r1ray.serving.submission import Delivery, Submission, drain, put_all

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Probe:
    future: asyncio.Future[None]
    loop: asyncio.AbstractEventLoop


class _Close:
    """Ends the engine thread."""


class Engine:
    """Serves token streams from one model to any number of asyncio callers.

    Args:
        build_generator: makes a generator for `max_concurrency` sequences; called once here and
            again on the engine thread after a failed step.
        max_concurrency: requests decoded together.
        max_queued_requests: further requests that may wait.
        timeout_s: how long a request may take; looked at between steps.
        forms: the generators'; a request's is compiled before the engine thread is given it.
        meter: of the generators' steps.
    """

    def __init__(
        self,
        build_generator: Callable[[], BatchGenerator],
        *,
        max_concurrency: int,
        max_queued_requests: int,
        timeout_s: float = math.inf,
        forms: FormCompiler | None = None,
        meter: SpeedMeter | None = None,
    ) -> None:
        self._meter = meter
        self._build_generator = build_generator
        self._max_concurrency = max_concurrency
        self._max_queued_requests = max_queued_requests
        self._timeout_s = timeout_s
        self._forms = forms
        self._metrics = EngineMetrics()
        self._commands: queue.SimpleQueue[Submission | _Cancel | _Probe | _Close] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()  # guards the next two
        self._open_ids: set[str] = set()
        self._closed = False
        # The rest belongs to the engine thread; `_stats` is replaced by it, never changed.
        self._submissions: dict[str, Submission] = {}
        self._probes: list[_Probe] = []
        self._generator = build_generator()
        self._stats = self._generator.stats()
        self._thread = threading.Thread(target=self._run, name="r1ray-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """Requests waiting, running or not yet read to their end."""
        return len(self._open_ids)

    @property
    def stats(self) -> GeneratorStats:
        """As of the latest step."""
        return self._stats

    @property
    def speed(self) -> Speed | None:
        """As measured by now; None where it is not."""
        return None if self._meter is None else self._meter.speed

    def metrics(self) -> list[Metric]:
        """For Prometheus, as of the latest step."""
        return self._metrics.read(self._stats)

    async def probe(self) -> None:
        """Return once the model has computed something: the step in progress, or one token.

        Raises:
            ServingError: it failed, or the engine is closed.
        """
        loop = asyncio.get_running_loop()
        probe = _Probe(loop.create_future(), loop)
        with self._lock:
            if self._closed:
                raise _closed_error()
            self._commands.put(probe)
        await probe.future

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        """Stream the tokens of `request`, as many at a time as are there; the last has a reason.

        Closing the iterator, or cancelling the task that reads it, frees the request's memory.

        Raises:
            ServingError: 429 when the queue is full, 503 when the engine is closed, 500 when the
                model failed, 400 when the request does not fit the generator, 504 when it takes
                too long.
        """
        submission = Submission(request, asyncio.get_running_loop())
        self._reserve(request.request_id)
        finished = False
        try:
            if request.form is not None and self._forms is not None:
                await self._compile(request.form, self._forms)
            self._enqueue(submission)
            while not finished:
                events, error = drain(await submission.inbox.get(), submission.inbox)
                finished = bool(events) and events[-1].finish_reason is not None
                if events:
                    yield events
                if error is not None:
                    raise error
        finally:
            self._unregister(request.request_id, cancel=not finished)

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop serving; open requests get an error. Returns when the thread ended. Idempotent.

        Raises:
            ServingError: the step in progress did not end within `timeout_s`.
        """
        self._commands.put(_Close())
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise ServingError(f"the engine did not stop within {timeout_s} s", status=500)

    async def _compile(self, form: str, forms: FormCompiler) -> None:
        """On another thread: `forms` keeps it for the engine's, whose steps do not wait."""
        try:
            await asyncio.to_thread(forms.start, form)
        except ShapeError as error:
            self._metrics.note_failure(400)
            raise ServingError(str(error), status=400) from error

    def _reserve(self, request_id: str) -> None:
        with self._lock:
            if self._closed:
                raise _closed_error()
            if len(self._open_ids) >= self._max_concurrency + self._max_queued_requests:
                self._metrics.note_failure(429)
                raise ServingError(
                    f"{self._max_concurrency} requests are running and "
                    f"{self._max_queued_requests} are waiting; try again later",
                    status=429,
                    code="rate_limit_exceeded",
                )
            assert request_id not in self._open_ids, "request ids are unique"
            self._open_ids.add(request_id)

    def _enqueue(self, submission: Submission) -> None:
        with self._lock:
            if self._closed:  # meanwhile
                raise _closed_error()
            self._commands.put(submission)

    def _unregister(self, request_id: str, *, cancel: bool) -> None:
        with self._lock:
            self._open_ids.discard(request_id)
            if cancel:
                self._commands.put(_Cancel(request_id))

    def _run(self) -> None:
        try:
            while self._take_commands():
                events = self._try_step()
                if events is None:
                    self._recover()
                else:
                    self._stats = self._generator.stats()  # seen by who has the last token
                    self._deliver((event.request_id, event) for event in events)
                    self._settle(None)
                self._expire()
        except Exception:
            logger.exception("the engine thread died")
        finally:
            self._end()

    def _take_commands(self) -> bool:
        """Apply all commands that are there; wait for one when idle. False: close."""
        while not (self._submissions or self._probes) or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, Submission):
                self._submissions[command.request.request_id] = command
                self._add(command)
            elif isinstance(command, _Cancel):
                if self._submissions.pop(command.request_id, None) is not None:
                    self._generator.cancel(command.request_id)
                self._stats = self._generator.stats()
            elif isinstance(command, _Probe):
                self._probes.append(command)
            else:
                return False
        return True

    def _add(self, submission: Submission) -> None:
        try:
            self._generator.add(submission.request)
        except ShapeError as error:
            refusal = ServingError(str(error), status=400)
            self._deliver([(submission.request.request_id, refusal)])

    def _try_step(self) -> list[TokenEvent] | None:
        """None where it failed; the error is gone then, whose frames hold the generator."""
        try:
            if self._submissions:
                return self._generator.step()
            self._generator.probe()
        except Exception:
            logger.exception("a step failed with %d requests", len(self._submissions))
            return None
        return []

    def _recover(self) -> None:
        error = ServingError("the model failed on this batch", status=500, code="internal_error")
        self._settle(error)
        begun = self._generator.begun or set(self._submissions)
        self._deliver([(name, error) for name in self._submissions if name in begun])
        del self._generator  # its cache must be gone before the next one is allocated
        self._generator = self._build_generator()
        for submission in list(self._submissions.values()):
            self._add(submission)
        self._stats = self._generator.stats()

    def _expire(self) -> None:
        latest = time.perf_counter() - self._timeout_s
        late = [name for name, item in self._submissions.items() if item.arrived_at < latest]
        error = ServingError(
            f"the request took longer than {self._timeout_s:g} s; ask for fewer tokens, or try "
            "again when there is less to do",
            status=504,
            code="timeout",
        )
        for name in late:
            self._generator.cancel(name)
        if late:
            self._stats = self._generator.stats()
        self._deliver([(name, error) for name in late])

    def _settle(self, error: ServingError | None) -> None:
        """Answer the probes."""
        for probe in self._probes:
            try:
                probe.loop.call_soon_threadsafe(_set_result, probe.future, error)
            except RuntimeError:  # the loop is closed, and who asked with it
                continue
        self._probes.clear()

    def _deliver(self, items: Iterable[tuple[str, TokenEvent | ServingError]]) -> None:
        """Pass each item to its caller; an error or a finish reason ends the submission here."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        now = time.perf_counter()
        for request_id, found in items:
            item: TokenEvent | ServingError = found
            if isinstance(found, TokenEvent) and found.failure is not None:
                item = ServingError(found.failure, status=500, code="internal_error")
            submission = self._submissions[request_id]
            self._note(submission, item, now)
            if isinstance(item, ServingError) or item.finish_reason is not None:
                del self._submissions[request_id]
            by_loop.setdefault(submission.loop, []).append((submission, item))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(put_all, pairs)
            except RuntimeError:  # the loop is closed, and its readers with it
                for submission, _ in pairs:
                    self._unregister(submission.request.request_id, cancel=True)

    def _note(self, submission: Submission, item: TokenEvent | ServingError, now: float) -> None:
        if isinstance(item, ServingError):
            self._metrics.note_failure(item.status)
            return
        latest = submission.latest_token_at
        since = submission.arrived_at if latest is None else latest
        self._metrics.note_token(now - since, is_first=latest is None)
        submission.latest_token_at = now
        if item.finish_reason is not None:
            self._metrics.note_answer(item.finish_reason, now - submission.arrived_at)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, Submission):
                self._submissions[command.request.request_id] = command
            elif isinstance(command, _Probe):
                self._probes.append(command)
        self._settle(_closed_error())
        self._deliver([(request_id, _closed_error()) for request_id in self._submissions])


def _set_result(future: asyncio.Future[None], error: ServingError | None) -> None:
    if future.done():  # who asked did not wait
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _closed_error() -> ServingError:
    return ServingError("the engine is shut down", status=503, code="service_unavailable")
