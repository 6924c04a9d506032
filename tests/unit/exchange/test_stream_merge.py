"""Merge rules by themselves: who is waited for, who is left out, and what the mean is."""

import math

import pytest
import torch
from torch import Tensor

from r1ray.errors import ExchangeError
from r1ray.exchange.mailbox import Frame, Kind
from r1ray.exchange.stream_merge import Broadcast, Contribution, MergeQueue, mean_delta

CODE = torch.tensor([1, 2, 3], dtype=torch.uint8)


def _queue(world_size: int = 4, *, final_version: int = 9) -> MergeQueue:
    return MergeQueue(world_size, grace_s=10.0, version=0, final_version=final_version)


def _add(queue: MergeQueue, version: int, ranks: list[int], now: float = 0.0) -> None:
    for rank in ranks:
        queue.add(Contribution(rank, version, num_targets=1, code=CODE), now)


def _taken(queue: MergeQueue) -> list[tuple[int, int]]:
    return [(item.version, item.rank) for item in queue.take()]


def test_a_version_with_all_contributions_is_merged_at_once_in_rank_order() -> None:
    queue = _queue()
    _add(queue, 0, [2, 0, 3])
    assert queue.missing() == [1]
    _add(queue, 0, [1])
    assert queue.ready_at() == -math.inf
    assert _taken(queue) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert (queue.version, queue.ready_at()) == (1, None)


@pytest.mark.parametrize(("world_size", "quorum"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_the_workers_rounded_up_start_the_grace_period(
    world_size: int, quorum: int
) -> None:
    queue = _queue(world_size)
    _add(queue, 0, list(range(quorum - 1)), now=1.0)
    assert queue.ready_at() is None
    _add(queue, 0, [quorum - 1], now=5.0)
    assert queue.ready_at() == 15.0
    if world_size > quorum + 1:
        _add(queue, 0, [quorum], now=12.0)
        assert queue.ready_at() == 15.0  # later ones do not prolong it


def test_a_late_contribution_joins_the_next_merge() -> None:
    queue = _queue()
    _add(queue, 0, [0, 1, 3])
    queue.take()
    _add(queue, 0, [2])
    _add(queue, 1, [0, 1, 3], now=100.0)
    assert queue.missing() == [2]
    assert queue.ready_at() == 110.0
    assert _taken(queue) == [(0, 2), (1, 0), (1, 1), (1, 3)]
    _add(queue, 1, [2])  # late again, but never by more than one version
    _add(queue, 2, [0, 1, 2, 3])
    assert queue.ready_at() == -math.inf
    assert _taken(queue) == [(1, 2), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_nobody_is_left_out_twice_in_a_row() -> None:
    queue = _queue()
    _add(queue, 0, [0, 1, 3])
    queue.take()
    _add(queue, 1, [0, 1, 3], now=100.0)
    assert queue.ready_at() is None
    _add(queue, 0, [2], now=500.0)
    assert queue.ready_at() == 110.0


def test_the_final_version_waits_for_everybody() -> None:
    queue = _queue(final_version=0)
    _add(queue, 0, [0, 1, 2])
    assert queue.ready_at() is None
    _add(queue, 0, [3])
    assert queue.ready_at() == -math.inf


@pytest.mark.parametrize("version", [1, 2])
def test_a_version_out_of_order_is_refused(version: int) -> None:
    with pytest.raises(ExchangeError, match=f"rank 3 sent version {version} after -1"):
        _add(_queue(), version, [3])


def test_a_contribution_sent_twice_is_refused() -> None:
    queue = _queue()
    with pytest.raises(ExchangeError, match="rank 1 sent version 0 after 0"):
        _add(queue, 0, [1, 1])


def _mean(*parts: tuple[int, int, list[float]]) -> Tensor:
    return mean_delta([(rank, count, torch.tensor(delta)) for rank, count, delta in parts], numel=2)


def test_the_mean_is_weighted_by_target_tokens() -> None:
    found = _mean((0, 1, [4.0, 0.0]), (1, 3, [0.0, 8.0]))
    assert found.tolist() == [1.0, 6.0]


def test_a_late_delta_adds_to_its_workers_next_without_diluting_the_others() -> None:
    punctual = _mean((0, 10, [1.0, 1.0]), (1, 10, [1.0, 2.0]))
    late = _mean((0, 10, [1.0, 1.0]), (1, 10, [1.0, 2.0]), (1, 10, [2.0, 4.0]))
    assert (late - punctual).tolist() == [1.0, 2.0]  # a half of it: there are two workers


def test_nobody_having_seen_a_target_moves_nothing() -> None:
    assert _mean((0, 0, [1.0, 1.0]), (1, 0, [3.0, 1.0])).tolist() == [0.0, 0.0]


def test_messages_survive_their_frames() -> None:
    contribution = Contribution(1, 5, 2**40, CODE)
    frame = Frame(1, Kind.CONTRIBUTION, 0, 5, contribution.pack())
    found = Contribution.unpack(frame)
    assert (found.rank, found.version, found.num_targets) == (1, 5, 2**40)
    assert torch.equal(found.code, CODE)
    broadcast = Broadcast(5, (True, False, True), CODE)
    read = Broadcast.unpack(Frame(1, Kind.BROADCAST, 0, 5, broadcast.pack()), 3)
    assert (read.version, read.merged) == (5, (True, False, True))
    assert torch.equal(read.code, CODE)


def test_a_frame_without_a_code_is_refused() -> None:
    with pytest.raises(ExchangeError, match="rank 2 sent a frame of 8 bytes"):
        Contribution.unpack(Frame(2, Kind.CONTRIBUTION, 0, 0, bytearray(8)))
