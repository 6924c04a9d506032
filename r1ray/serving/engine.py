"""Asynchronous access to one `BatchGenerator`, which a single thread of its own drives.

1. `submit` registers a request, in the caller's event loop, unless too many are open.
2. The engine thread takes commands (submit, cancel, close), admits waiting requests while rows are
   free, runs one step of the generator and hands the step's tokens to the callers' loops.
3. A step that raises fails the requests that were in the generator, and only those: a fresh
   generator replaces it, since the state of the old one is unknown.

Price: a command waits for the step in progress; one wake-up of a caller's loop per step. Callers
that read slowly get several tokens at once, so the engine never waits for them.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field

from r1ray.errors import ServingError, ShapeError
from r1ray.models.generation import BatchGenerator, GenerationRequest, TokenEvent

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


@dataclass
class _Submission:
    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[TokenEvent | ServingError] = field(default_factory=asyncio.Queue)


_Delivery = tuple[_Submission, TokenEvent | ServingError]


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class _Close:
    """Ends the engine thread."""


class Engine:
    """Serves token streams from one model to any number of asyncio callers.

    Args:
        build_generator: makes a generator with `max_concurrency` free rows; called once here and
            again on the engine thread after a failed step.
        max_concurrency: requests decoded together.
        max_queued_requests: further requests that may wait for a row.
    """

    def __init__(
        self,
        build_generator: Callable[[], BatchGenerator],
        *,
        max_concurrency: int,
        max_queued_requests: int,
    ) -> None:
        self._build_generator = build_generator
        self._max_concurrency = max_concurrency
        self._max_queued_requests = max_queued_requests
        self._commands: queue.SimpleQueue[_Submission | _Cancel | _Close] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the next two
        self._open_ids: set[str] = set()
        self._closed = False
        # The rest belongs to the engine thread.
        self._waiting: dict[str, _Submission] = {}
        self._running: dict[str, _Submission] = {}
        self._generator = build_generator()
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
    def num_running(self) -> int:
        """Requests that hold a row, as of the latest step."""
        return len(self._running)

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        """Stream the tokens of `request`, as many at a time as are there; the last has a reason.

        Closing the iterator, or cancelling the task that reads it, frees the request's row.

        Raises:
            ServingError: 429 when the queue is full, 503 when the engine is closed, 500 when the
                model failed, 400 when the request does not fit the generator.
        """
        submission = self._register(request)
        finished = False
        try:
            while not finished:
                events, error = _drain(await submission.inbox.get(), submission.inbox)
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

    def _register(self, request: GenerationRequest) -> _Submission:
        submission = _Submission(request, asyncio.get_running_loop())
        with self._lock:
            if self._closed:
                raise _closed_error()
            if len(self._open_ids) >= self._max_concurrency + self._max_queued_requests:
                raise ServingError(
                    f"{self._max_concurrency} requests are running and "
                    f"{self._max_queued_requests} are waiting; try again later",
                    status=429,
                    code="rate_limit_exceeded",
                )
            assert request.request_id not in self._open_ids, "request ids are unique"
            self._open_ids.add(request.request_id)
            self._commands.put(submission)
        return submission

    def _unregister(self, request_id: str, *, cancel: bool) -> None:
        with self._lock:
            self._open_ids.discard(request_id)
            if cancel:
                self._commands.put(_Cancel(request_id))

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._admit()
                try:
                    events = self._generator.step()
                except Exception:
                    logger.exception("a step failed with %d requests", len(self._running))
                    self._recover()
                else:
                    self._deliver((event.request_id, event) for event in events)
        except Exception:
            logger.exception("the engine thread died")
        finally:
            self._end()

    def _take_commands(self) -> bool:
        """Apply all commands that are there; wait for one when idle. False: close."""
        while not (self._waiting or self._running) or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Submission):
                self._waiting[command.request.request_id] = command
            elif isinstance(command, _Cancel):
                self._waiting.pop(command.request_id, None)
                if self._running.pop(command.request_id, None) is not None:
                    self._generator.cancel(command.request_id)
            else:
                return False
        return True

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_concurrency:
            request_id = next(iter(self._waiting))
            submission = self._running[request_id] = self._waiting.pop(request_id)
            try:
                self._generator.add(submission.request)
            except ShapeError as error:
                self._deliver([(request_id, ServingError(str(error), status=400))])

    def _recover(self) -> None:
        error = ServingError("the model failed on this batch", status=500, code="internal_error")
        self._deliver([(request_id, error) for request_id in self._running])
        del self._generator  # its cache must be gone before the next one is allocated
        self._generator = self._build_generator()

    def _deliver(self, items: Iterable[tuple[str, TokenEvent | ServingError]]) -> None:
        """Pass each item to its caller; an error or a finish reason ends the submission here."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}
        for request_id, found in items:
            item: TokenEvent | ServingError = found
            if isinstance(found, TokenEvent) and found.failure is not None:
                item = ServingError(found.failure, status=500, code="internal_error")
            submission = self._running[request_id]
            if isinstance(item, ServingError) or item.finish_reason is not None:
                del self._running[request_id]
            by_loop.setdefault(submission.loop, []).append((submission, item))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:  # the loop is closed, and its readers with it
                for submission, _ in pairs:
                    self._unregister(submission.request.request_id, cancel=True)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Submission):
                self._waiting[command.request.request_id] = command
        self._running |= self._waiting
        self._waiting.clear()
        self._deliver([(request_id, _closed_error()) for request_id in self._running])


def _drain(
    first: TokenEvent | ServingError, inbox: asyncio.Queue[TokenEvent | ServingError]
) -> tuple[list[TokenEvent], ServingError | None]:
    """(the events that are there, the error behind them if there is one)."""
    events: list[TokenEvent] = []
    item = first
    while not isinstance(item, ServingError):
        events.append(item)
        if inbox.empty():
            return events, None
        item = inbox.get_nowait()
    return events, item


def _put_all(pairs: list[_Delivery]) -> None:
    for submission, item in pairs:
        submission.inbox.put_nowait(item)


def _closed_error() -> ServingError:
    return ServingError("the engine is shut down", status=503, code="service_unavailable")
