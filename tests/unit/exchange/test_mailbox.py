"""Frames between two ends of a socket, and the connections between three workers on loopback."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from r1ray.errors import ExchangeError
from r1ray.exchange.mailbox import Frame, Kind, Mailbox
from r1ray.exchange.peers import connect_peers
from tests.unit.exchange.threads import ThreadTransport, run_workers

HEADER_BYTES = 15


def _mailbox(rank: int, peer: int, connection: socket.socket) -> Mailbox:
    return Mailbox(
        rank, {peer: connection}, num_fragments=4, max_payload_bytes=1 << 20, max_waiting=8
    )


@pytest.fixture
def pair() -> Iterator[tuple[Mailbox, Mailbox]]:
    ends = socket.socketpair()
    mailboxes = (_mailbox(0, 1, ends[0]), _mailbox(1, 0, ends[1]))
    yield mailboxes
    for mailbox in mailboxes:
        mailbox.close()


@pytest.fixture
def exposed() -> Iterator[tuple[Mailbox, socket.socket]]:
    """Rank 0's mailbox, and the bare socket that should be rank 1's."""
    ends = socket.socketpair()
    mailbox = _mailbox(0, 1, ends[0])
    yield mailbox, ends[1]
    mailbox.close()
    ends[1].close()


def _take(mailbox: Mailbox, kind: Kind) -> Frame:
    frame = mailbox.take(kind, 5.0)
    assert frame is not None
    return frame


def test_frames_arrive_whole_in_order_and_by_kind(pair: tuple[Mailbox, Mailbox]) -> None:
    large = bytearray(torch.arange(900_000, dtype=torch.int32).to(torch.uint8).numpy().tobytes())
    pair[0].send(1, Kind.CONTRIBUTION, 2, 7, large)
    pair[0].send(1, Kind.BROADCAST, 3, 70_000, bytearray(b"b"))
    pair[0].send(1, Kind.CONTRIBUTION, 0, 8, bytearray())
    assert _take(pair[1], Kind.BROADCAST) == Frame(0, Kind.BROADCAST, 3, 70_000, bytearray(b"b"))
    assert _take(pair[1], Kind.CONTRIBUTION) == Frame(0, Kind.CONTRIBUTION, 2, 7, large)
    assert _take(pair[1], Kind.CONTRIBUTION).version == 8
    sent = len(large) + 1 + 3 * HEADER_BYTES
    assert pair[1].received_bytes == sent
    deadline = time.monotonic() + 5.0
    while pair[0].sent_bytes < sent and time.monotonic() < deadline:
        time.sleep(0.01)  # what has arrived is counted when the sender's call returns
    assert pair[0].sent_bytes == sent
    assert (pair[0].received_bytes, pair[1].sent_bytes) == (0, 0)


def test_a_frame_to_oneself_costs_no_bytes(pair: tuple[Mailbox, Mailbox]) -> None:
    pair[0].send(0, Kind.BROADCAST, 1, 1, bytearray(b"own"))
    assert _take(pair[0], Kind.BROADCAST).payload == b"own"
    assert pair[0].sent_bytes == 0


def test_taking_gives_up_after_its_timeout(pair: tuple[Mailbox, Mailbox]) -> None:
    started = time.monotonic()
    assert pair[0].take(Kind.BROADCAST, 0.05) is None
    assert time.monotonic() - started >= 0.05


def test_a_peer_that_dies_fails_whoever_waits_or_sends(
    exposed: tuple[Mailbox, socket.socket],
) -> None:
    mailbox, peer = exposed
    threading.Timer(0.05, peer.close).start()
    with pytest.raises(ExchangeError, match="rank 1 is gone"):
        mailbox.take(Kind.BROADCAST, 5.0)
    with pytest.raises(ExchangeError, match="rank 1 is gone"):
        mailbox.send(1, Kind.BROADCAST, 0, 0, bytearray())


def test_a_peer_that_dies_within_a_frame_leaves_no_part_of_it(
    exposed: tuple[Mailbox, socket.socket],
) -> None:
    mailbox, peer = exposed
    peer.sendall(bytes([2, 0, 0, 0, 0, 0, 0]) + (100).to_bytes(8, "big") + b"half")
    peer.close()
    with pytest.raises(ExchangeError, match="rank 1 is gone"):
        mailbox.take(Kind.BROADCAST, 5.0)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * HEADER_BYTES,
        b"GET / HTTP/1.1\r\n\r\n",
        bytes([1, 0, 4, 0, 0, 0, 0]) + (10).to_bytes(8, "big"),  # fragment 4 of 4
        bytes([1, 0, 0, 0, 0, 0, 0]) + (1 << 40).to_bytes(8, "big"),  # a payload of 1 TiB
    ],
)
def test_garbage_is_refused_before_memory_is_taken(
    exposed: tuple[Mailbox, socket.socket], header: bytes
) -> None:
    mailbox, peer = exposed
    peer.sendall(header)
    with pytest.raises(ExchangeError, match="rank 1 sent a frame of kind"):
        mailbox.take(Kind.CONTRIBUTION, 5.0)


def test_frames_that_nobody_takes_are_bounded(pair: tuple[Mailbox, Mailbox]) -> None:
    for version in range(9):
        pair[0].send(1, Kind.CONTRIBUTION, 0, version, bytearray())
    with pytest.raises(ExchangeError, match="more than the 8 frames"):
        pair[1].take(Kind.BROADCAST, 5.0)


def test_closing_wakes_whoever_waits_and_ends_all_threads() -> None:
    before = threading.active_count()
    ends = socket.socketpair()
    mailbox = _mailbox(0, 1, ends[0])
    threading.Timer(0.05, mailbox.close).start()
    started = time.monotonic()
    assert mailbox.take(Kind.BROADCAST, 5.0) is None
    assert time.monotonic() - started < 2.0
    mailbox.close()
    assert threading.active_count() <= before + 1  # the timer's may still be ending
    assert ends[1].recv(1) == b""
    ends[1].close()


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def _send_and_take(transport: ThreadTransport) -> list[tuple[int, bytes]]:
    mailbox = Mailbox(
        transport.rank,
        connect_peers(transport, timeout_s=5.0),
        num_fragments=1,
        max_payload_bytes=100,
        max_waiting=8,
    )
    for rank in range(transport.world_size):
        mailbox.send(rank, Kind.BROADCAST, 0, 0, bytearray(f"{transport.rank}->{rank}".encode()))
    frames = [_take(mailbox, Kind.BROADCAST) for _ in range(transport.world_size)]
    transport.all_gather(torch.zeros(1))  # nobody closes before all have what they wait for
    mailbox.close()
    return sorted((frame.sender, bytes(frame.payload)) for frame in frames)


def test_every_worker_reaches_every_other() -> None:
    for rank, frames in enumerate(run_workers(3, _send_and_take)):
        assert frames == [(peer, f"{peer}->{rank}".encode()) for peer in range(3)]


class _StrayTransport(ThreadTransport):
    """Before rank 1 connects to rank 0, something else does."""

    strays: list[socket.socket]

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = super().all_gather(x)
        if self.rank == 1 and not self.strays:
            port = int.from_bytes(bytes(gathered[0][20:22].tolist()), "big")
            for hello in (b"\0" * 16 + (1).to_bytes(4, "big"), b"GET / HTTP/1.1\r\n\r\n  ", b""):
                self.strays.append(socket.create_connection(("127.0.0.1", port)))
                self.strays[-1].sendall(hello)
            self.strays[-1].close()
        return gathered


def test_a_stray_connection_or_a_wrong_token_gets_nowhere() -> None:
    strays: list[socket.socket] = []

    def work(transport: ThreadTransport) -> list[tuple[int, bytes]]:
        transport.__class__ = _StrayTransport
        cast(_StrayTransport, transport).strays = strays
        return _send_and_take(transport)

    for rank, frames in enumerate(run_workers(2, work)):
        assert frames == [(peer, f"{peer}->{rank}".encode()) for peer in range(2)]
    for stray in strays[:2]:
        stray.settimeout(5.0)
        assert stray.recv(64) == b""  # closed, and the token was not given away
        stray.close()


def test_a_worker_that_does_not_connect_is_an_error_after_the_timeout() -> None:
    def work(transport: ThreadTransport) -> None:
        if transport.rank == 0:
            connect_peers(transport, timeout_s=0.2)
        else:
            transport.all_gather(torch.zeros(22, dtype=torch.uint8))

    started = time.monotonic()
    errors = run_workers(2, work)
    assert isinstance(errors[0], ExchangeError)
    assert 0.2 <= time.monotonic() - started < 3.0


def test_one_worker_alone_needs_no_network() -> None:
    assert run_workers(1, lambda transport: connect_peers(transport, timeout_s=1.0)) == [{}]


def test_an_unknown_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    errors = run_workers(2, lambda transport: connect_peers(transport, timeout_s=1.0))
    assert all("nowhere0" in str(error) for error in errors)
