"""Fixtures shared by all tests: at most one local Ray per session."""

import os
import secrets
from collections.abc import Iterator

# Read when Ray, or a process that it starts, comes up: before anything imports it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # as jobs do
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of 3 CPUs on this machine, started for the first test that asks and ended after all.

    Serve and Train leave actors behind: a test that starts them stops them.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        resources={"NPU": 1},  # an accelerator in name only, for who asks for one
        object_store_memory=256 * 1024 * 1024,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
