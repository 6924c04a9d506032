"""One logging set-up for drivers, workers and replicas."""

import logging
import sys

__all__ = ["setup_logging"]


def setup_logging(level: int = logging.INFO) -> None:
    """Log r1ray's events to stderr, one line each; other libraries from WARNING on. Idempotent."""
    root = logging.getLogger("r1ray")
    root.setLevel(level)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
