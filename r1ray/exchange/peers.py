"""A TCP connection between every two workers.

1. Every worker listens on an address of its own. Addresses and a random token of rank 0's travel
   over the collective transport.
2. Of each pair the higher rank connects, and both prove that they know the token: a stray
   connection is closed and forgotten.

IPv4 only, neither encrypted nor signed: the network between the workers is trusted as far as
torch.distributed already trusts it.
"""

import contextlib
import hmac
import os
import secrets
import socket
import struct
import time

import torch

from r1ray.errors import ExchangeError
from r1ray.exchange.transport import Transport

__all__ = ["connect_peers", "read_exactly"]

_HELLO = struct.Struct("!16sI")  # token, rank
_CARD = struct.Struct("!16s4sH")  # token, IPv4 address, port
_HELLO_TIMEOUT_S = 5.0
_GET_INTERFACE_ADDRESS = 0x8915  # Linux: SIOCGIFADDR


def connect_peers(transport: Transport, *, timeout_s: float) -> dict[int, socket.socket]:
    """A connected socket to every other worker, by rank. Every worker calls it.

    Args:
        transport: between the same workers, for tensors on the host.

    Raises:
        ExchangeError: a worker could not be reached within `timeout_s`.
    """
    rank, world_size = transport.rank, transport.world_size
    if world_size == 1:
        return {}
    deadline = time.monotonic() + timeout_s
    peers: dict[int, socket.socket] = {}
    host = _own_address()
    with contextlib.ExitStack() as on_error, socket.create_server((host, 0)) as listener:
        on_error.callback(_close_all, peers)
        card = _CARD.pack(
            secrets.token_bytes(16), socket.inet_aton(host), listener.getsockname()[1]
        )
        cards = transport.all_gather(torch.frombuffer(bytearray(card), dtype=torch.uint8))
        token = _CARD.unpack(cards[0].numpy().tobytes())[0]
        for peer in range(rank):
            _, address, port = _CARD.unpack(cards[peer].numpy().tobytes())
            peers[peer] = _connect((socket.inet_ntoa(address), port), token, rank, peer, deadline)
        while len(peers) < world_size - 1:
            accepted = _accept(listener, token, rank, deadline)
            if accepted is None:
                continue
            peer, connection = accepted
            if not rank < peer < world_size or peer in peers:
                connection.close()
                raise ExchangeError(f"rank {peer} connected where it was not expected")
            peers[peer] = connection
        on_error.pop_all()
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peers


def _connect(
    address: tuple[str, int], token: bytes, rank: int, peer: int, deadline: float
) -> socket.socket:
    try:
        connection = socket.create_connection(address, timeout=_remaining(deadline))
    except OSError as error:
        raise ExchangeError(f"rank {peer} at {address} cannot be reached: {error}") from error
    try:
        connection.settimeout(_remaining(deadline))
        connection.sendall(_HELLO.pack(token, rank))
        found = _HELLO.unpack(read_exactly(connection, _HELLO.size))
    except OSError as error:
        connection.close()
        raise ExchangeError(f"rank {peer} at {address} does not answer: {error}") from error
    if not hmac.compare_digest(found[0], token) or found[1] != peer:
        connection.close()
        raise ExchangeError(f"what listens at {address} is not rank {peer} of this run")
    return connection


def _accept(
    listener: socket.socket, token: bytes, rank: int, deadline: float
) -> tuple[int, socket.socket] | None:
    """The next worker to connect; None if it was something else."""
    listener.settimeout(_remaining(deadline))
    try:
        connection, _ = listener.accept()
    except TimeoutError as error:
        raise ExchangeError("a worker of a higher rank has not connected in time") from error
    try:
        connection.settimeout(min(_HELLO_TIMEOUT_S, _remaining(deadline)))
        found, peer = _HELLO.unpack(read_exactly(connection, _HELLO.size))
        if hmac.compare_digest(found, token):
            connection.sendall(_HELLO.pack(token, rank))
            return peer, connection
    except OSError:
        pass  # not a worker, or one that dies: then the deadline tells
    connection.close()
    return None


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ExchangeError("the workers have not connected to one another in time")
    return left


def _own_address() -> str:
    """IPv4 address of the interface that torch.distributed uses."""
    if interface := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return _interface_address(interface)
    if master := os.environ.get("MASTER_ADDR"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # sends nothing: only chooses the route
            return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())


def _interface_address(name: str) -> str:
    import fcntl  # POSIX only, as the variable is

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(
                probe, _GET_INTERFACE_ADDRESS, struct.pack("256s", name.encode()[:15])
            )
        except OSError as error:
            raise ExchangeError(
                f"GLOO_SOCKET_IFNAME={name}: no IPv4 address on that interface ({error})"
            ) from error
    return socket.inet_ntoa(found[20:24])


def read_exactly(connection: socket.socket, size: int) -> bytearray:
    """The next `size` bytes; an OSError if the connection ends before."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("it closed the connection")
        view = view[count:]
    return buffer


def _close_all(peers: dict[int, socket.socket]) -> None:
    for peer in peers.values():
        peer.close()
