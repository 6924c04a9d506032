"""Moving tensors between workers; the exchanges above it decide what and when.

Bytes are counted as the usual algorithms move them: a ring all-reduce sends and receives
2(N-1)/N of a tensor, the others what goes to and comes from other workers. What the network adds
is counted at its interface by the benchmark.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
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

    sent_bytes: int
    received_bytes: int

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce_sum(self, x: Tensor) -> Pending:
        """Start replacing `x`, in place, by its sum over the workers."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[N, *x.shape]: every worker's `x`, in rank order."""

    def all_to_all(self, payloads: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """What the workers sent here, in rank order.

        Args:
            payloads: uint8 vectors, one for each worker.
            sizes: bytes that each worker sends here.
        """

    def fork(self) -> "Transport":
        """A transport of its own between the same workers, for tensors on the host.

        Its collectives may run on another thread than this one's.
        """

    def close(self) -> None:
        """Give back what `fork` made."""


class _Done:
    def wait(self) -> None:
        return None


class LocalTransport:
    """One worker alone: it has everything already."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.sent_bytes = self.received_bytes = 0

    def all_reduce_sum(self, x: Tensor) -> Pending:
        del x  # is its own sum
        return _Done()

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def all_to_all(self, payloads: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        del sizes
        return list(payloads)

    def fork(self) -> Self:
        return self

    def close(self) -> None:
        return None


class _Work:
    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> None:
        _translated(self._work.wait)


class CollectiveTransport:
    """A torch.distributed process group; the default one (gloo or nccl) unless forked.

    Args:
        timeout_s: longest wait for a collective of a forked group.
    """

    def __init__(self, *, timeout_s: float, group: dist.ProcessGroup | None = None) -> None:
        self._timeout_s = timeout_s
        self._group = group
        self.sent_bytes = self.received_bytes = 0

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def all_reduce_sum(self, x: Tensor) -> Pending:
        self._count(2 * x.nbytes * (self.world_size - 1) // self.world_size)
        work = dist.all_reduce(x, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        assert work is not None, "async collectives return a handle"
        return _Work(work)

    def all_gather(self, x: Tensor) -> Tensor:
        self._count(x.nbytes * (self.world_size - 1))
        gathered = x.new_empty((self.world_size, *x.shape))
        _translated(
            lambda: dist.all_gather_into_tensor(gathered.flatten(), x.flatten(), group=self._group)
        )
        return gathered

    def all_to_all(self, payloads: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        sent = [len(payload) for payload in payloads]
        self.sent_bytes += sum(sent) - sent[self.rank]
        self.received_bytes += sum(sizes) - sizes[self.rank]
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        _translated(
            lambda: dist.all_to_all_single(
                received, torch.cat(list(payloads)), list(sizes), sent, group=self._group
            )
        )
        return list(received.split(list(sizes)))

    def fork(self) -> "CollectiveTransport":
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self._timeout_s))
        return CollectiveTransport(timeout_s=self._timeout_s, group=group)

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _count(self, size_bytes: int) -> None:
        self.sent_bytes += size_bytes
        self.received_bytes += size_bytes


def _translated(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:
        raise ExchangeError(f"a collective failed; a worker is gone or slow: {error}") from error
