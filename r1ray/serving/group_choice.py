"""Which group of replicas answers a request: the one that is likely to be done with it first.

1. Every group's replicas measure how fast they read and write (`r1ray.models.speed`).
2. The ingress knows what it has given to each group, and how much of it is left: tokens of prompts
   until the first token of the answer is there, then those that are to be written, as far as that
   can be predicted (`r1ray.models.answer_lengths`).
3. A request goes where reading what is due and itself, waiting for a place, and writing at the pace
   of a fuller batch take the least time together (`estimate_s`). What a group has read of it before
   need not be read again.

Replicas of a group are alike: which of them answers is for `r1ray.serving.routing`. One ingress
knows all that there is to do; with several, each would know a part.

Price: O(requests in flight) a request; digests as in routing.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from r1ray.config.serving import ReplicaConfig
from r1ray.models.answer_lengths import AnswerLengths
from r1ray.models.pages import chain_digests
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.speed import Speed
from r1ray.ops.block_selection import BLOCK
from r1ray.serving.prefixes import REMEMBERED, PrefixMemory

__all__ = ["GroupBoard", "Work", "estimate_s"]


@dataclass(frozen=True)
class Work:
    """What a request needs of the replica that answers it, in tokens.

    Attributes:
        num_known: of the prompt's beginning, already read.
    """

    num_known: int
    num_to_read: int
    num_to_write: int


def estimate_s(
    work: Work, ahead: Collection[Work], speed: Speed, *, num_replicas: int, max_concurrency: int
) -> float:
    """Seconds until a group is done with `work`.

    Args:
        ahead: what it was given before, as far as that is not done; shared evenly by its replicas.
        speed: of a replica.
        max_concurrency: sequences that one decodes together.
    """
    each = len(ahead) / num_replicas
    reading = sum(speed.reading_s(item.num_to_read, item.num_known) for item in ahead)
    reading = reading / num_replicas + speed.reading_s(work.num_to_read, work.num_known)
    step_s = speed.writing_s(min(each + 1, max_concurrency))
    waiting = 0.0
    if (too_many := each + 1 - max_concurrency) > 0:  # must end first; a place is free each time
        mean_left = sum(item.num_to_write for item in ahead) / len(ahead)
        waiting = too_many / max_concurrency * mean_left * step_s
    return waiting + reading + work.num_to_write * step_s


@dataclass(eq=False)
class _Given:
    """A request on its way."""

    request: GenerationRequest
    work: Work
    num_written: int = 0


@dataclass
class _Group:
    config: ReplicaConfig
    speeds: Sequence[Speed] = ()
    given: list[_Given] = field(default_factory=list)
    memory: PrefixMemory[None] = field(default_factory=lambda: PrefixMemory(REMEMBERED))

    @property
    def is_full(self) -> bool:
        """Whether another request would be refused."""
        return len(self.given) >= len(self.speeds) * self.config.max_open_requests


class GroupBoard:
    """What one model's groups are known to be capable of, and to be doing. Not thread-safe.

    Args:
        groups: in the order that they are taken in where nothing else is known.
        lengths: of answers; learns from those that end.
    """

    def __init__(self, groups: Mapping[str | None, ReplicaConfig], lengths: AnswerLengths) -> None:
        self._groups = {name: _Group(config) for name, config in groups.items()}
        self._lengths = lengths

    def report(self, name: str | None, speeds: Sequence[Speed]) -> None:
        """What the group's replicas have measured: those that answer; none where it is gone."""
        group = self._groups[name]
        group.speeds = tuple(speeds)
        if not speeds:  # and what they have read with them
            group.memory = PrefixMemory(REMEMBERED)

    def rank(self, request: GenerationRequest) -> list[str | None]:
        """All groups, in the order in which they should be asked.

        First those that have told a speed, where there is a place to wait, by who is done first.
        """
        if len(self._groups) == 1:
            return list(self._groups)
        digests = chain_digests(request.prompt_ids)

        def cost(name: str | None) -> tuple[bool, bool, float]:
            group = self._groups[name]
            if not group.speeds:
                return True, True, 0.0
            return False, group.is_full, self._estimate(group, request, digests)

        return sorted(self._groups, key=cost)

    @contextmanager
    def give(self, name: str | None, request: GenerationRequest) -> Iterator["_Progress"]:
        """Count `request` as the group's while it is being answered; tell what comes of it."""
        group = self._groups[name]
        digests = chain_digests(request.prompt_ids) if len(self._groups) > 1 else []
        given = _Given(request, self._work(group, request, digests))
        group.given.append(given)
        group.memory.remember(digests, None)
        try:
            yield _Progress(given, self._lengths)
        finally:
            group.given.remove(given)

    def _estimate(
        self, group: _Group, request: GenerationRequest, digests: Sequence[bytes]
    ) -> float:
        work, ahead = self._work(group, request, digests), [item.work for item in group.given]
        times = [
            estimate_s(
                work,
                ahead,
                speed,
                num_replicas=len(group.speeds),
                max_concurrency=group.config.max_concurrency,
            )
            for speed in group.speeds
        ]
        return sum(times) / len(times)

    def _work(self, group: _Group, request: GenerationRequest, digests: Sequence[bytes]) -> Work:
        num_prompt = len(request.prompt_ids)
        # The last token is always read.
        num_known = min(group.memory.count_known(digests) * BLOCK, num_prompt - 1)
        num_new = self._lengths.predict(0, request.max_new_tokens)
        return Work(num_known, num_prompt - num_known, num_new)


class _Progress:
    """Of one request."""

    def __init__(self, given: _Given, lengths: AnswerLengths) -> None:
        self._given, self._lengths = given, lengths

    def note(self, events: Sequence[TokenEvent]) -> None:
        """More of the answer is there."""
        given = self._given
        given.num_written += len(events)
        most = given.request.max_new_tokens
        left = self._lengths.predict(given.num_written, most) - given.num_written
        given.work = replace(given.work, num_to_read=0, num_to_write=max(left, 0))
        if events and (reason := events[-1].finish_reason) is not None:
            self._lengths.observe(given.num_written, was_cut=reason == "length")
