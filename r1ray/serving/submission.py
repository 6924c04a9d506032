"""A request in the engine, and how its tokens get to whoever asked, in another thread."""

import asyncio
import time
from dataclasses import dataclass, field

from r1ray.errors import ServingError
from r1ray.models.requests import GenerationRequest, TokenEvent

__all__ = ["Delivery", "Submission", "drain", "put_all"]


@dataclass
class Submission:
    """Attributes:
    loop: of whoever asked; the inbox belongs to it.
    arrived_at, latest_token_at: on the clock `time.perf_counter`.
    """

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[TokenEvent | ServingError] = field(default_factory=asyncio.Queue)
    arrived_at: float = field(default_factory=time.perf_counter)
    latest_token_at: float | None = None


Delivery = tuple[Submission, TokenEvent | ServingError]


def drain(
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


def put_all(pairs: list[Delivery]) -> None:
    """Into the inboxes; called in the loop that they belong to."""
    for submission, item in pairs:
        submission.inbox.put_nowait(item)
