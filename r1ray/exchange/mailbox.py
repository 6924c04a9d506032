"""Messages between any two workers over TCP, for exchanges that cannot wait for everybody.

A collective hangs or aborts when one worker is late; here each pair has a connection of its own,
and whoever waits says for how long.

1. Per peer, one daemon thread sends and one receives. A frame is a header of 15 bytes (kind,
   fragment, version, payload size) and the payload. `send` never blocks.
2. `tell` says how far this worker is, so that others tell a slow worker from one that hangs.
3. A connection that ends, or that carries anything but such frames, is a failure: whoever waits
   gets an ExchangeError that names the rank, and so does whoever asks later.

There is no farewell and no reconnection: workers close after a collective that all of them passed,
and a broken run starts again from its checkpoint.

Price: the frames, 15 bytes each beside their payload, and TCP's own headers. Payloads wait in
memory until the link takes them, and there until they are taken.
"""

import contextlib
import queue
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from r1ray.errors import ExchangeError
from r1ray.exchange.peers import read_exactly

__all__ = ["Frame", "Kind", "Mailbox"]

_HEADER = struct.Struct("!BHIQ")  # kind, fragment, version, payload bytes


class Kind(IntEnum):
    """What a frame carries; each kind waits in an inbox of its own."""

    CONTRIBUTION = 1
    BROADCAST = 2
    STEP = 3  # no inbox: the version is the number of steps made


@dataclass(frozen=True)
class Frame:
    """One message. The payload is shared between its receivers here: nobody writes to it."""

    sender: int
    kind: Kind
    fragment: int
    version: int
    payload: bytearray


class Mailbox:
    """Sends frames to other workers and keeps theirs until they are taken. Thread-safe.

    Args:
        rank: of this worker.
        peers: a connected socket to every other worker, which the mailbox then owns.
        num_fragments: fragments are numbered below it.
        max_payload_bytes: longer frames are refused.
        max_waiting: most frames of one kind waiting to be taken; more are a failure.
    """

    def __init__(
        self,
        rank: int,
        peers: Mapping[int, socket.socket],
        *,
        num_fragments: int,
        max_payload_bytes: int,
        max_waiting: int,
    ) -> None:
        self._rank = rank
        self._peers = dict(peers)
        self._num_fragments = num_fragments
        self._max_payload_bytes = max_payload_bytes
        self._max_waiting = max_waiting
        self._inboxes: dict[Kind, deque[Frame]] = {kind: deque() for kind in Kind}
        self._steps = dict.fromkeys(peers, 0)
        self._heard_at = time.monotonic()
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._is_closed = False
        self._outboxes: dict[int, queue.SimpleQueue[bytes | None]] = {
            peer: queue.SimpleQueue() for peer in peers
        }
        # One writer each, so that counting needs no lock.
        self._sent = dict.fromkeys(peers, 0)
        self._received = dict.fromkeys(peers, 0)
        self._threads = [
            threading.Thread(target=loop, args=(peer,), daemon=True, name=f"{name}-{peer}")
            for peer in peers
            for name, loop in (("mailbox-send", self._send_all), ("mailbox-read", self._read_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def sent_bytes(self) -> int:
        """Frames handed to the network, headers included."""
        return sum(self._sent.values())

    @property
    def received_bytes(self) -> int:
        return sum(self._received.values())

    def send(self, to: int, kind: Kind, fragment: int, version: int, payload: bytearray) -> None:
        """Hand a frame to `to`, which may be this worker; the payload must not change afterwards.

        Raises:
            ExchangeError: a worker is gone.
        """
        self.check()
        if to == self._rank:
            self._deliver(Frame(to, kind, fragment, version, payload))
            return
        header = _HEADER.pack(kind, fragment, version, len(payload))
        self._outboxes[to].put(header + payload)

    def take(self, kind: Kind, timeout_s: float | None) -> Frame | None:
        """The oldest waiting frame of this kind; None after `timeout_s`, or once it is closed.

        Raises:
            ExchangeError: a worker is gone, or `fail` was called.
        """
        inbox = self._inboxes[kind]
        with self._changed:
            self._changed.wait_for(
                lambda: inbox or self._failure is not None or self._is_closed, timeout_s
            )
            self.check()
            return inbox.popleft() if inbox and not self._is_closed else None

    def tell(self, step: int) -> None:
        """Let all others know that this worker has made so many steps."""
        for peer in self._peers:
            self.send(peer, Kind.STEP, 0, step, bytearray())

    def begin_to_listen(self) -> None:
        """Count `silent_s` from here."""
        with self._changed:
            self._heard_at = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since anything came from anybody."""
        return time.monotonic() - self._heard_at

    def wait_for_step(self, step: int, timeout_s: float) -> list[int]:
        """Wait until all others have told of `step` steps; who has not, after a long silence.

        Args:
            timeout_s: without a word from anybody.
        Raises:
            ExchangeError: a worker is gone.
        """
        self.begin_to_listen()
        with self._changed:
            while behind := [peer for peer, done in self._steps.items() if done < step]:
                self.check()
                left_s = timeout_s - self.silent_s()
                if left_s <= 0 or self._is_closed:
                    return behind
                self._changed.wait(left_s)
        return []

    def check(self) -> None:
        """Raise what went wrong, if anything did."""
        if self._failure is not None and not self._is_closed:
            raise ExchangeError(self._failure)

    def fail(self, reason: str) -> None:
        """Let everybody who uses this mailbox find out; the first reason is kept."""
        with self._changed:
            if self._failure is None:
                self._failure = reason
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        """End threads and connections; what was not sent or taken yet is lost."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for outbox in self._outboxes.values():
            outbox.put(None)
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the other side was faster
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for peer in self._peers.values():
            peer.close()

    def _send_all(self, peer: int) -> None:
        try:
            while (message := self._outboxes[peer].get()) is not None:
                self._peers[peer].sendall(message)
                self._sent[peer] += len(message)
        except OSError as error:
            self.fail(f"rank {peer} cannot be reached any more: {error}")

    def _read_all(self, peer: int) -> None:
        try:
            while True:
                frame = self._read_frame(peer)
                self._received[peer] += _HEADER.size + len(frame.payload)
                self._deliver(frame)
        except OSError as error:
            self.fail(f"rank {peer} is gone: {error}")
        except ExchangeError as error:
            self.fail(str(error))

    def _read_frame(self, peer: int) -> Frame:
        header = read_exactly(self._peers[peer], _HEADER.size)
        kind, fragment, version, size = _HEADER.unpack(header)
        if (
            kind not in tuple(Kind)
            or fragment >= self._num_fragments
            or size > self._max_payload_bytes
        ):
            raise ExchangeError(
                f"rank {peer} sent a frame of kind {kind}, fragment {fragment} and {size} bytes; "
                f"kinds end at {max(Kind)}, fragments at {self._num_fragments}, payloads at "
                f"{self._max_payload_bytes} bytes: do all workers run the same configuration?"
            )
        payload = read_exactly(self._peers[peer], size)
        return Frame(peer, Kind(kind), fragment, version, payload)

    def _deliver(self, frame: Frame) -> None:
        with self._changed:
            self._heard_at = time.monotonic()
            if frame.kind == Kind.STEP:
                self._steps[frame.sender] = frame.version
                self._changed.notify_all()
                return
            inbox = self._inboxes[frame.kind]
            if len(inbox) >= self._max_waiting:
                raise ExchangeError(
                    f"rank {frame.sender} sent more than the {self._max_waiting} frames that can "
                    "wait here"
                )
            inbox.append(frame)
            self._changed.notify_all()
