"""Moving tensors between workers; the exchanges above it decide what and when."""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from r1ray.errors import ExchangeError

__all__ = ["CollectiveTransport", "LocalTransport", "Pending", "Transport"]


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Block until the tensor holds the result; raises ExchangeError when it cannot."""


class Transport(Protocol):
    """Collectives over all workers; every worker calls the same ones in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce_sum(self, x: Tensor) -> Pending:
        """Start replacing `x`, in place, by its sum over the workers."""


class _Done:
    def wait(self) -> None:
        return None


class LocalTransport:
    """One worker alone: sums are what it has."""

    rank = 0
    world_size = 1

    def all_reduce_sum(self, x: Tensor) -> Pending:
        del x  # is its own sum
        return _Done()


class _Work:
    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise ExchangeError(
                f"a collective failed; a worker is gone or slow: {error}"
            ) from error


class CollectiveTransport:
    """torch.distributed's default process group (gloo or nccl)."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def all_reduce_sum(self, x: Tensor) -> Pending:
        work = dist.all_reduce(x, op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None, "async collectives return a handle"
        return _Work(work)
