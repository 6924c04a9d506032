"""Step records as Ray metrics: for Prometheus, and the dashboard on top of it."""

from ray.util.metrics import Counter, Gauge

from r1ray.observability.metrics import TRAIN_METRICS, Metric
from r1ray.training.step import StepRecord

__all__ = ["StepMetrics"]

_TAGS = ("run", "rank")


class StepMetrics:
    """One worker's metrics.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str | None, rank: int) -> None:
        self._rank = rank
        tags = {"run": run or "", "rank": str(rank)}
        self._metrics: list[tuple[Metric, Counter | Gauge]] = []
        for metric in TRAIN_METRICS:
            if metric.is_shared and metric.kind == "gauge" and rank != 0:
                continue
            kind = Counter if metric.kind == "counter" else Gauge
            exported = kind(metric.name, description=metric.description, tag_keys=_TAGS)
            exported.set_default_tags(tags)
            self._metrics.append((metric, exported))

    def observe(self, record: StepRecord) -> None:
        """Export what one step did; what it did not have keeps its last value."""
        for metric, exported in self._metrics:
            value = getattr(record, metric.field)
            if value is None or (metric.is_shared and self._rank != 0 and not record.is_local):
                continue
            if isinstance(exported, Gauge):
                exported.set(value)
            elif value > 0:
                exported.inc(value)
