"""What the owner of a shard does in streaming: collect, merge, step, broadcast.

Of every fragment, a worker owns one shard: the outer momentum of it, and the part of the global
weights that the others have not been told yet. Versions of a shard are merged in order:

1. Contributions are what the workers learned and have not sent before: global minus local weights.
2. A version is merged when all contributions are there, or, a grace period after half of the
   workers (rounded up) have contributed, without the others: theirs join the next version. Nobody
   falls more than one version behind: the next merge waits for whoever was left out. So every
   contribution counts, once, and what can wait here is bounded. The final version waits for all.
3. A worker's contributions are added up, and the workers' sums averaged, weighted by the target
   tokens they saw.
4. Nesterov: m <- mu*m + g, step = g + mu*m, at a rate of one: without momentum, a merge is the
   average of the workers' weights.
5. unsent <- unsent - step; its int4 code goes to everybody and is taken off. The rounding error
   stays in `unsent` and goes with the next version.

Price: 8 bytes per element of the shard, kept; decoding N payloads and encoding one a version, on a
thread of the owner's, so that an owner whose training is late does not keep the others waiting.
"""

import logging
import math
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1ray.errors import ExchangeError
from r1ray.exchange.codecs import Codec
from r1ray.exchange.mailbox import Frame, Kind, Mailbox
from r1ray.exchange.stream_fragments import shard_slices
from r1ray.exchange.stream_schedule import StreamSchedule

__all__ = ["Broadcast", "Contribution", "MergeQueue", "ShardOwner", "mean_delta"]

logger = logging.getLogger(__name__)

_NUM_TARGETS = struct.Struct("!Q")


@dataclass(frozen=True)
class Contribution:
    """One worker's encoded delta of a shard.

    Attributes:
        num_targets: target tokens that it was learned from.
        code: uint8, the codec's payload.
    """

    rank: int
    version: int
    num_targets: int
    code: Tensor

    def pack(self) -> bytearray:
        """The frame's payload."""
        return bytearray(_NUM_TARGETS.pack(self.num_targets)) + _bytes(self.code)

    @classmethod
    def unpack(cls, frame: Frame) -> "Contribution":
        """Raises ExchangeError: the frame is too short."""
        header, code = _split(frame, _NUM_TARGETS.size)
        (num_targets,) = _NUM_TARGETS.unpack(header)
        return cls(frame.sender, frame.version, num_targets, code)


@dataclass(frozen=True)
class Broadcast:
    """A merged version of a shard.

    Attributes:
        merged: per rank, whether its contribution to this version is in it; if not, the one to
            the version before is.
        code: uint8, the codec's payload of what to add to the global weights.
    """

    version: int
    merged: tuple[bool, ...]
    code: Tensor

    def pack(self) -> bytearray:
        """The frame's payload."""
        return bytearray(self.merged) + _bytes(self.code)

    @classmethod
    def unpack(cls, frame: Frame, world_size: int) -> "Broadcast":
        """Raises ExchangeError: the frame is too short."""
        merged, code = _split(frame, world_size)
        return cls(frame.version, tuple(map(bool, merged)), code)


class MergeQueue:
    """Contributions to one shard, and when they may be merged. Pure: the caller says the time.

    Args:
        version: the next one to be merged; all workers are in those before.
        final_version: the one that nobody is left out of.
    """

    def __init__(
        self, world_size: int, *, grace_s: float, version: int, final_version: int
    ) -> None:
        self.version = version
        self._final_version = final_version
        self._quorum = math.ceil(world_size / 2)
        self._grace_s = grace_s
        self._newest = [version - 1] * world_size
        self._waiting: list[Contribution] = []
        self._quorum_at: float | None = None

    def add(self, contribution: Contribution, now: float) -> None:
        """Raises ExchangeError: the worker has skipped a version or is ahead."""
        newest = self._newest[contribution.rank]
        if contribution.version != newest + 1 or contribution.version > self.version:
            raise ExchangeError(
                f"rank {contribution.rank} sent version {contribution.version} after {newest}, "
                f"where {self.version} is to be merged; do all workers run the same configuration?"
            )
        self._newest[contribution.rank] += 1
        self._waiting.append(contribution)
        if self._quorum_at is None and self._num_present() >= self._quorum:
            self._quorum_at = now

    def ready_at(self) -> float | None:
        """The time from which the version can be merged; None while only waiting can tell."""
        if not self.missing():
            return -math.inf
        if self.version == self._final_version or min(self._newest) < self.version - 1:
            return None
        return None if self._quorum_at is None else self._quorum_at + self._grace_s

    def missing(self) -> list[int]:
        """Ranks that have not contributed to this version."""
        return [rank for rank, newest in enumerate(self._newest) if newest < self.version]

    def take(self) -> list[Contribution]:
        """All contributions, by version and rank; the next version begins."""
        taken = sorted(self._waiting, key=lambda item: (item.version, item.rank))
        self._waiting, self._quorum_at = [], None
        self.version += 1
        return taken

    def _num_present(self) -> int:
        return len(self._newest) - len(self.missing())


def mean_delta(parts: Sequence[tuple[int, int, Tensor]], numel: int) -> Tensor:
    """The workers' mean delta, weighted by target tokens; zero where nobody saw any.

    A late worker's contributions add up, at the weight of one: their mean number of tokens.

    Args:
        parts: (rank, target tokens, float32 [numel]).
    """
    total = torch.zeros(numel)
    weights: dict[int, list[int]] = {}
    for rank, num_targets, delta_E in parts:
        total.add_(delta_E, alpha=num_targets)
        weights.setdefault(rank, []).append(num_targets)
    divisor = sum(sum(counts) / len(counts) for counts in weights.values())
    return total.div_(divisor) if divisor else total


class ShardOwner:
    """The owner's thread and state: momentum and unsent weights of its shard of every fragment.

    Args:
        numels: elements of every fragment.
        momentum: mu, before it falls to zero at the end of the phase.
        grace_s: how long a merge waits for the second half of the workers.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        mailbox: Mailbox,
        codec: Codec,
        schedule: StreamSchedule,
        numels: Sequence[int],
        *,
        momentum: float,
        grace_s: float,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._mailbox = mailbox
        self._codec = codec
        self._schedule = schedule
        self._momentum = momentum
        self._grace_s = grace_s
        own = [shard_slices(numel, world_size)[rank] for numel in numels]
        self._momenta = [torch.zeros(shard.stop - shard.start) for shard in own]
        self._unsent = [torch.zeros(shard.stop - shard.start) for shard in own]
        self._queues: list[MergeQueue] = []
        self._thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """Merge from here on, after `step` steps; a second call does nothing."""
        if self._thread is not None:
            return
        self._queues = [
            MergeQueue(
                self._world_size,
                grace_s=self._grace_s,
                version=self._schedule.next_version(fragment, step),
                final_version=self._schedule.final_version(fragment),
            )
            for fragment in range(len(self._unsent))
        ]
        self._thread = threading.Thread(target=self._run, daemon=True, name="shard-owner")
        self._thread.start()

    def missing(self, fragment: int) -> list[int]:
        """Ranks that have not contributed to the fragment's next merge."""
        return self._queues[fragment].missing()

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Of this worker's shards, while nothing is being merged."""
        return {
            "momentum": [item.clone() for item in self._momenta],
            "unsent": [item.clone() for item in self._unsent],
        }

    def load_state_dict(self, states: Sequence[dict[str, list[Tensor]]]) -> None:
        """Continue from the shards of all workers, whose number may have been another."""
        for name, mine in (("momentum", self._momenta), ("unsent", self._unsent)):
            for fragment, part in enumerate(mine):
                whole_E = torch.cat([state[name][fragment] for state in states])
                part.copy_(whole_E[shard_slices(len(whole_E), self._world_size)[self._rank]])

    def close(self) -> None:
        """Wait for the thread; the mailbox must have been closed."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._mailbox.is_closed:
                frame = self._mailbox.take(Kind.CONTRIBUTION, self._patience())
                if frame is not None:
                    queue = self._queues[frame.fragment]
                    queue.add(Contribution.unpack(frame), time.monotonic())
                self._merge_ready()
        except Exception as error:  # of a thread: the training thread finds it in the mailbox
            logger.debug("the shard owner stopped", exc_info=True)
            self._mailbox.fail(str(error))

    def _patience(self) -> float | None:
        times = [at for queue in self._queues if (at := queue.ready_at()) is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _merge_ready(self) -> None:
        for fragment, queue in enumerate(self._queues):
            ready_at = queue.ready_at()
            if ready_at is not None and ready_at <= time.monotonic():
                if missing := queue.missing():
                    logger.warning(
                        "fragment %d, version %d: merged without ranks %s, which are late",
                        fragment,
                        queue.version,
                        missing,
                    )
                self._merge(fragment, queue)

    def _merge(self, fragment: int, queue: MergeQueue) -> None:
        version, missing = queue.version, queue.missing()
        unsent_E, momentum_E = self._unsent[fragment], self._momenta[fragment]
        numel = len(unsent_E)
        parts = [
            (item.rank, item.num_targets, self._codec.decode(item.code, numel))
            for item in queue.take()
        ]
        mu = self._momentum * self._schedule.momentum_share(fragment, version)
        delta_E = mean_delta(parts, numel)
        momentum_E.mul_(mu).add_(delta_E)
        unsent_E.sub_(delta_E).sub_(momentum_E, alpha=mu)
        code, told_E = self._codec.encode_with_reconstruction(unsent_E)
        unsent_E.sub_(told_E)
        merged = tuple(rank not in missing for rank in range(self._world_size))
        payload = Broadcast(version, merged, code).pack()
        for rank in range(self._world_size):
            self._mailbox.send(rank, Kind.BROADCAST, fragment, version, payload)


def _bytes(code: Tensor) -> bytes:
    return code.numpy().tobytes()


def _split(frame: Frame, size: int) -> tuple[bytearray, Tensor]:
    if len(frame.payload) <= size:
        raise ExchangeError(f"rank {frame.sender} sent a frame of {len(frame.payload)} bytes")
    return frame.payload[:size], torch.frombuffer(frame.payload, dtype=torch.uint8, offset=size)
