"""A server that ends with the process that started it, however that ends.

Serve's own actors outlive the driver that made them, and a driver is not always let end in peace:
`ray job stop` kills after 3 seconds, in which a busy controller may not even have answered.

Price: a process of Ray's that waits.
"""

import os
import select
import sys
import threading

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["end_guard", "start_guard"]

_NAMESPACE = "r1ray"


class ServerGuard:
    """Shuts Serve down once a process of its node has ended, if it still runs `application`."""

    def __init__(self, process: int, application: str) -> None:
        assert sys.platform == "linux"
        self._application = application
        self._process: int | None
        try:
            self._process = os.pidfd_open(process)
        except ProcessLookupError:  # it was killed before this actor was there
            self._process = None
        threading.Thread(target=self._wait, name="guard", daemon=True).start()

    def _wait(self) -> None:
        try:
            if self._process is not None:
                select.select([self._process], [], [])
            from ray import serve  # seconds of importing, which a start need not wait for

            if self._application in serve.status().applications:
                serve.shutdown()
        finally:
            ray.kill(ray.get_runtime_context().current_actor)


def start_guard(application: str) -> "ray.ObjectRef[bool] | None":
    """Shut Serve down when this process has ended without `end_guard`.

    On Linux alone: elsewhere Ray is on one machine.

    Args:
        application: of Serve's, by name.
    Returns:
        What fails where the operating system does not let one wait for a process.
    """
    if sys.platform != "linux":
        return None
    node = ray.get_runtime_context().get_node_id()
    guard = (
        ray.remote(ServerGuard)
        .options(
            name=_name(),
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(os.getpid(), application)
    )
    return guard.__ray_ready__.remote()  # type: ignore[union-attr]


def end_guard() -> None:
    """Let the guard go that `start_guard` made for this driver, if it is there."""
    try:
        guard = ray.get_actor(_name(), namespace=_NAMESPACE)
    except ValueError:
        return
    ray.kill(guard)


def _name() -> str:
    return f"server-guard-{ray.get_runtime_context().get_job_id()}"
