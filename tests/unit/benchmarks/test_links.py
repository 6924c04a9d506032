"""Links hold their rate, count what passes, can be cut, and leave nothing behind."""

import os
import subprocess
import sys

import pytest

from jobs.benchmarks.links import measure_rate, shaped_network, why_unavailable

_REASON = why_unavailable()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def _namespaces() -> list[str]:
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=10
    ).stdout
    return [line.split()[0] for line in listed.splitlines() if f"r1ray-{os.getpid()}-" in line]


def test_a_link_holds_a_bulk_transfer_to_its_rate_and_counts_every_frame() -> None:
    with shaped_network(2, 200) as network:
        before = network.read_bytes(0)
        rate = measure_rate(network, senders=[0], receiver=1, seconds=1.0)
        after = network.read_bytes(0)
        received = network.read_bytes(1).received
    assert 170 < rate < 205
    sent = after.sent - before.sent
    assert 1.03 < 8e-6 * sent / rate < 1.3  # a second and the drain of buffers, 54 of 1514 headers
    assert received == pytest.approx(sent, rel=0.02)  # drops in between; ARP of the switch


def test_what_a_worker_receives_from_several_is_limited_too() -> None:
    with shaped_network(3, 50) as network:
        assert 40 < measure_rate(network, senders=[0, 1], receiver=2, seconds=1.0) < 51


def test_a_cut_link_carries_nothing_until_it_is_restored() -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], 7000), float(sys.argv[2]))"
    listen = "import socket, time; s = socket.create_server(('', 7000)); print(1, flush=True); "
    with shaped_network(2, None) as network:
        server = network.start(
            1, [sys.executable, "-c", listen + "time.sleep(60)"], stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        server.stdout.readline()
        connect = [sys.executable, "-c", reach, network.address(1)]
        network.run(0, [*connect, "10"], timeout_s=20)
        network.cut(1)
        with pytest.raises(subprocess.CalledProcessError):
            network.run(0, [*connect, "0.3"], timeout_s=20)
        network.restore(1)
        # a lost first packet is sent again after 1, 2 and 4 seconds, and so is a lost ARP request
        network.run(0, [*connect, "10"], timeout_s=20)
        server.stdout.close()


def _interrupt(started: list[subprocess.Popen[bytes]]) -> None:
    with shaped_network(2, 50) as network:
        assert len(_namespaces()) == 3
        started.append(network.start(0, ["sleep", "60"]))
        with pytest.raises(subprocess.TimeoutExpired):
            network.run(1, ["sleep", "60"], timeout_s=0.1)
        raise KeyboardInterrupt


def test_nothing_is_left_behind_whatever_ends_the_block() -> None:
    started: list[subprocess.Popen[bytes]] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupt(started)
    assert started[0].poll() is not None
    assert _namespaces() == []
