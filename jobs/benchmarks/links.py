"""Shaped links between processes of one machine: a network namespace per worker, and a switch.

1. Each worker's namespace holds one interface, `eth0`: a veth pair to a port of a bridge, which has
   a namespace of its own. No route leads out of it, or in.
2. `tc tbf` limits both ends of every pair: what a worker sends, and what the switch sends to it.
   A full queue of 50 ms drops frames, as a switch does.
3. Frames are Ethernet's: 1500 bytes, and no segment is left to a network card to cut, so that the
   limit and the interface's counters see every header and acknowledgement.

Price: each frame costs the processors a few microseconds, at both ends and in the bridge, which a
network card would save them; at 1 Gbit/s that is what limits several workers on two cores.

Needs Linux, root and iproute2. `python -m jobs.benchmarks.links send|receive ...` is the transfer
that `measure_rate` times.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "INTERFACE",
    "LinkBytes",
    "Network",
    "measure_rate",
    "read_link_bytes",
    "shaped_network",
    "why_unavailable",
]

INTERFACE = "eth0"
_SUBNET = "10.77.0"
_PORT = 29_400
_BURST_MS, _MIN_BURST_BYTES, _QUEUE_MS = 1.0, 16 << 10, 50
_BLOCK = bytes(64 << 10)
_TIMEOUT_S = 30
_serial = itertools.count()  # of the networks of this process


@dataclass(frozen=True)
class LinkBytes:
    """Bytes through an interface: headers, acknowledgements and what was sent again included."""

    sent: int
    received: int


def read_link_bytes() -> LinkBytes:
    """What passed `INTERFACE` of the namespace that this process is in, since it was made."""
    counters = Path("/sys/class/net") / INTERFACE / "statistics"
    return LinkBytes(*(int((counters / f"{way}_bytes").read_text()) for way in ("tx", "rx")))


def why_unavailable() -> str | None:
    """Why links cannot be made here; None where they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} command; install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"r1ray-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        _shape(probe, "lo", rate_mbit=1)
    except subprocess.SubprocessError as error:
        return f"the kernel refuses network namespaces or tbf ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, timeout=_TIMEOUT_S)
    return None


class Network:
    """The namespaces and links of `num_workers` workers; made and removed by `shaped_network`."""

    def __init__(self, num_workers: int, rate_mbit: float | None) -> None:
        self.num_workers, self.rate_mbit = num_workers, rate_mbit
        self._prefix = f"r1ray-{os.getpid()}-{next(_serial)}"
        self._switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []
        self._processes: list[subprocess.Popen[Any]] = []

    def address(self, rank: int) -> str:
        """The IPv4 address of worker `rank`."""
        return f"{_SUBNET}.{rank + 1}"

    def start(self, rank: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `command` in the namespace of worker `rank`, in a session of its own.

        Args:
            options: of `subprocess.Popen`.
        """
        inside = ["ip", "netns", "exec", self._name(rank), *command]
        process = subprocess.Popen(inside, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def run(
        self, rank: int, command: Sequence[str], *, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` in the namespace of worker `rank` and return its output.

        Raises:
            subprocess.SubprocessError: it failed, or took too long and was killed.
        """
        inside = ["ip", "netns", "exec", self._name(rank), *command]
        return _run(*inside, timeout_s=timeout_s)

    def read_bytes(self, rank: int) -> LinkBytes:
        """What has passed the interface of worker `rank`."""
        shown = _run("ip", "-n", self._name(rank), "-s", "-j", "link", "show", INTERFACE).stdout
        counters = json.loads(shown)[0]["stats64"]
        return LinkBytes(counters["tx"]["bytes"], counters["rx"]["bytes"])

    def cut(self, rank: int) -> None:
        """Pull the cable of worker `rank`: the switch's port goes down, addresses stay."""
        _run("ip", "-n", self._switch, "link", "set", f"port{rank}", "down")

    def restore(self, rank: int) -> None:
        """Put the cable back."""
        _run("ip", "-n", self._switch, "link", "set", f"port{rank}", "up")

    def build(self) -> None:
        """Make everything; `close` removes it again, also after a failure half-way."""
        self._add_namespace(self._switch)
        _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "switch", "up")
        for rank in range(self.num_workers):
            self._add_namespace(self._name(rank))
            self._connect(rank)

    def close(self) -> None:
        """Kill what still runs inside, then remove the namespaces, and the links with them."""
        interrupts = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, interrupts)
        try:
            for process in self._processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(timeout=_TIMEOUT_S)
            while self._namespaces:
                _run("ip", "netns", "del", self._namespaces.pop())
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts)

    def _name(self, rank: int) -> str:
        return f"{self._prefix}-{rank}"

    def _add_namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._namespaces.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _connect(self, rank: int) -> None:
        worker, port = self._name(rank), f"port{rank}"
        ends = ((self._switch, port), (worker, INTERFACE))
        peer = ("peer", "name", INTERFACE, "netns", worker)
        _run("ip", "-n", self._switch, "link", "add", port, "type", "veth", *peer)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "switch")
        address = f"{self.address(rank)}/24"
        _run("ip", "-n", worker, "address", "add", address, "dev", INTERFACE)
        for namespace, device in ends:
            _run("ip", "-n", namespace, "link", "set", device, "mtu", "1500", "gso_max_segs", "1")
            _run("ip", "-n", namespace, "link", "set", device, "addrgenmode", "none", "up")
            if self.rate_mbit is not None:
                _shape(namespace, device, self.rate_mbit)


@contextlib.contextmanager
def shaped_network(num_workers: int, rate_mbit: float | None) -> Iterator[Network]:
    """A network that is gone, with the processes in it, when the block is left.

    Args:
        rate_mbit: of every link, each way, in 10^6 bits a second; None leaves them unlimited.
    """
    network = Network(num_workers, rate_mbit)
    try:
        network.build()
        yield network
    finally:
        network.close()


def measure_rate(
    network: Network, *, senders: Sequence[int], receiver: int, seconds: float
) -> float:
    """Mbit/s of payload that bulk TCP transfers of `senders` bring to `receiver` together."""
    tool = [sys.executable, "-m", __name__]
    sink = network.start(
        receiver, [*tool, "receive", str(len(senders))], stdout=subprocess.PIPE, text=True
    )
    assert sink.stdout is not None
    sink.stdout.readline()  # it listens
    for rank in senders:
        network.start(rank, [*tool, "send", network.address(receiver), str(seconds)])
    output, _ = sink.communicate(timeout=seconds + _TIMEOUT_S)
    received = json.loads(output)
    return 8e-6 * float(received["bytes"]) / float(received["seconds"])


def _shape(namespace: str, device: str, rate_mbit: float) -> None:
    burst = max(_MIN_BURST_BYTES, round(rate_mbit * 1e3 * _BURST_MS / 8))
    limits = ("rate", f"{rate_mbit * 1e6:.0f}bit", "burst", f"{burst}b")
    root = ("qdisc", "add", "dev", device, "root", "tbf")
    _run("tc", "-n", namespace, *root, *limits, "latency", f"{_QUEUE_MS}ms")


def _run(*command: str, timeout_s: float = _TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run `command` where Ctrl-C does not reach it: what it makes is known before it is left."""
    return subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        start_new_session=True,
    )


def _receive(num_senders: int) -> None:
    """Print the bytes of so many connections, and the seconds until the last of them ends."""
    with socket.create_server(("", _PORT)) as server:
        print("listening", flush=True)
        connections = [server.accept()[0] for _ in range(num_senders)]
    started = time.perf_counter()
    buffer, total = bytearray(len(_BLOCK)), 0
    while connections:
        for connection in select.select(connections, [], [])[0]:
            count = connection.recv_into(buffer)
            total += count
            if not count:
                connections.remove(connection)
    print(json.dumps({"bytes": total, "seconds": time.perf_counter() - started}), flush=True)


def _send(address: str, seconds: float) -> None:
    with socket.create_connection((address, _PORT), timeout=_TIMEOUT_S) as connection:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            connection.sendall(_BLOCK)


def _main(way: str, *arguments: str) -> None:
    if way == "receive":
        _receive(int(arguments[0]))
    else:
        _send(arguments[0], float(arguments[1]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
