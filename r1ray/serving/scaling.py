"""How many replicas there should be: as many as there is work for, counted in tokens.

Serve asks every replica for the tokens that it has yet to read or write (`GeneratorStats`), and
this policy for the number of replicas. Requests would be the wrong unit: one may be of ten tokens,
or of ten thousand. Serve itself waits before it follows (`upscale_delay_s`, `downscale_delay_s`).
"""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

__all__ = ["TOKENS_DUE", "TokenScaling"]

TOKENS_DUE = "tokens_due"


class TokenScaling:
    """A policy of Serve's autoscaling.

    Args:
        tokens_per_replica: the work of one.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """(replicas, no state)."""
        due = sum((context.aggregated_metrics or {}).get(TOKENS_DUE, {}).values())
        wanted = math.ceil(due / self._tokens_per_replica)
        least = context.capacity_adjusted_min_replicas
        return max(least, min(wanted, context.capacity_adjusted_max_replicas)), {}
