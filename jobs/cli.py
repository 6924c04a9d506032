"""What all jobs share: arguments, errors, signals, and the connection to Ray.

Torch, Ray and the stages are imported only after the arguments are read, so `--help` is instant.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from r1ray.config import PipelineConfig, load_config
from r1ray.config.loader import describe_fields
from r1ray.errors import ConfigError, ForgettingError, R1RayError

__all__ = ["connected_to_ray", "print_summary", "run_guarded", "run_job", "run_stage"]

_RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # notice the end at once
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # half the time of a streamed message by actor calls
}
for _name, _value in _RAY_DEFAULTS.items():  # here, since Ray reads some when it is imported
    os.environ.setdefault(_name, _value)

EXIT_ERROR = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130


def run_job(
    name: str,
    summary: str,
    body: Callable[[PipelineConfig], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the arguments, run `body` on the configuration, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys:\n" + describe_fields(),
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override a configuration key"
    )
    arguments = parser.parse_args(argv)

    def load_and_run() -> None:
        config = load_config(arguments.config, arguments.overrides)
        _check_root(config)
        body(config)

    return run_guarded(load_and_run)


def run_guarded(body: Callable[[], None]) -> int:
    """Run `body`; the exit code. What a user can mend is told in one line, without a traceback."""
    _exit_on_sigterm()
    try:
        body()
    except (R1RayError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED if isinstance(error, ForgettingError) else EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from where it was", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def run_stage(stage: str, summary: str, argv: Sequence[str] | None = None) -> int:
    """Run one stage of the pipeline alone; the stages before it must have finished."""

    def body(config: PipelineConfig) -> None:
        with connected_to_ray():
            from r1ray.pipeline import Pipeline

            artifact = getattr(Pipeline(config, only=stage), stage)()
            print_summary(artifact.local_dir)
            print(f"{stage}: {artifact.location}")

    return run_job(stage, summary, body, argv)


def print_summary(directory: Path) -> None:
    """Show what a stage says of its outcome in words, if it does."""
    summary = directory / "summary.md"
    if summary.exists():
        print(summary.read_text(encoding="utf-8"))


@contextmanager
def connected_to_ray() -> Iterator[None]:
    """Inside a submitted job, that job's cluster; else RAY_ADDRESS, or a local Ray of our own."""
    import ray

    from r1ray.observability.logging import setup_logging

    setup_logging()
    if address := os.environ.get("RAY_ADDRESS"):
        _check_reachable(address)
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # in the dashboard's API
        ray.init(log_to_driver=False)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    _exit_on_sigterm()  # Ray put a handler of its own in its place
    try:
        yield
    finally:
        ray.shutdown()


def _exit_on_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _check_reachable(address: str) -> None:
    """Ray retries for minutes where nothing listens; other forms of address are left to it."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and no Ray answers there ({error}); unset it to use a "
            "local Ray, or start the cluster"
        ) from error


def _check_root(config: PipelineConfig) -> None:
    """A submitted job runs in a copy of the working directory that goes away with it."""
    root = config.run.root
    if os.environ.get("RAY_ADDRESS") and "://" not in root and not os.path.isabs(root):
        raise ConfigError(
            f"run.root {root!r} is relative, and this job runs on a cluster; give an absolute path "
            "that every node sees, or a URI"
        )
