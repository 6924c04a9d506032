"""A server that ends with the process that started it, however that ends.

Serve's own actors outlive the driver that made them, and a driver is not always let end in peace:
`ray job stop` kills after 3 seconds, in which a busy controller may not even have answered.
"""

import os
import select
import sys

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["end_guard", "start_guard"]


class ServerGuard:
    """Waits, on the driver's node, for the driver's end."""

    def stop_serve_after(self, process: int) -> None:
        """Shut Serve down once the process of this number has ended, and end."""
        assert sys.platform == "linux"
        try:
            ended = os.pidfd_open(process)
        except ProcessLookupError:
            pass  # before this actor was there
        else:
            select.select([ended], [], [])
        serve.shutdown()
        ray.actor.exit_actor()


def start_guard() -> None:
    """Shut Serve down when this process has ended without `end_guard`.

    On Linux: elsewhere Ray is on one machine, and ends with the driver that started it.
    """
    if sys.platform != "linux":
        return
    node = ray.get_runtime_context().get_node_id()
    guard = (
        ray.remote(ServerGuard)
        .options(
            name=_guard_name(),
            lifetime="detached",
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote()
    )
    guard.stop_serve_after.remote(os.getpid())  # type: ignore[attr-defined]


def end_guard() -> None:
    """Let the guard go that `start_guard` made in this process, if it is there."""
    try:
        guard = ray.get_actor(_guard_name())
    except ValueError:
        return
    ray.kill(guard)


def _guard_name() -> str:
    return f"r1ray-server-guard-{os.getpid()}"
