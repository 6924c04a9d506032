"""Several workers in one process, a thread each: collectives without processes to start."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from r1ray.errors import ExchangeError
from r1ray.exchange.transport import LocalTransport, Pending

__all__ = ["ThreadTransport", "run_workers"]

T = TypeVar("T")
_TIMEOUT_S = 20.0


class _World:
    """What the workers lay side by side, behind a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_S)

    def share(self, rank: int, value: Any) -> list[Any]:
        try:
            self._slots[rank] = value
            self._barrier.wait()
            shared = list(self._slots)
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise ExchangeError("a collective failed") from error
        return shared

    def abort(self) -> None:
        self._barrier.abort()


class ThreadTransport:
    """A `Transport` between threads; `fork` is the same one, since all keep one order."""

    def __init__(self, rank: int, world: _World) -> None:
        self.rank = rank
        self.world_size = world.size
        self.sent_bytes = self.received_bytes = 0
        self._world = world

    def all_reduce_sum(self, x: Tensor) -> Pending:
        x.copy_(torch.stack(self._world.share(self.rank, x.clone())).sum(0))
        return LocalTransport().all_reduce_sum(x)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._world.share(self.rank, x.clone()))

    def all_to_all(self, payloads: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        received = [row[self.rank] for row in self._world.share(self.rank, list(payloads))]
        assert [len(payload) for payload in received] == list(sizes)
        return received

    def share(self, value: Any) -> list[Any]:
        """Every worker's `value`, in rank order."""
        return self._world.share(self.rank, value)

    def fork(self) -> Self:
        return self

    def close(self) -> None:
        return None


def run_workers(world_size: int, work: Callable[[ThreadTransport], T]) -> list[T | Exception]:
    """What `work` returned or raised on every rank; collectives fail once one has raised."""
    world = _World(world_size)

    def run(rank: int) -> T | Exception:
        try:
            return work(ThreadTransport(rank, world))
        except Exception as error:
            world.abort()
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
