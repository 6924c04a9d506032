"""What an engine tells Prometheus, in the terms of `r1ray.observability.metrics`.

Counts and gauges are read from the engine when they are asked for; times are noted as they pass.

Price: two or three microseconds a token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from r1ray.models.requests import GeneratorStats
from r1ray.models.speed import Speed
from r1ray.observability.metrics import SERVE_HISTOGRAMS, SERVE_METRICS, SPEED_METRICS

__all__ = ["EngineMetrics", "describe_speed", "render_metrics"]


class EngineMetrics:
    """Of one engine; its thread notes, any other reads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._seconds = {
            key: Histogram(
                item.name, item.description, buckets=item.buckets, registry=self._registry
            )
            for key, item in SERVE_HISTOGRAMS.items()
        }
        self._answered = Counter(
            "r1ray:request_success",
            "Answers, by how they ended.",
            ["finished_reason"],
            registry=self._registry,
        )
        self._failed = Counter(
            "r1ray:request_failure",
            "Errors instead of answers, by HTTP status.",
            ["status"],
            registry=self._registry,
        )

    def note_token(self, waited_s: float, *, is_first: bool) -> None:
        """A token came, so long after the request or the token before it."""
        self._seconds["first" if is_first else "next"].observe(waited_s)

    def note_answer(self, reason: str, seconds: float) -> None:
        """An answer ended, so long after its request."""
        self._answered.labels(reason).inc()
        self._seconds["whole"].observe(seconds)

    def note_failure(self, status: int) -> None:
        """A request got an error instead of an answer, or of the rest of it."""
        self._failed.labels(str(status)).inc()

    def read(self, stats: GeneratorStats) -> list[Metric]:
        """All there is, with `stats` of now."""
        values = asdict(stats)
        families: list[Metric] = list(self._registry.collect())
        for item in SERVE_METRICS:
            family = GaugeMetricFamily if item.kind == "gauge" else CounterMetricFamily
            families.append(family(item.name, item.description, value=values[item.field]))
        return families


def describe_speed(speed: Speed) -> list[Metric]:
    """What was measured, as gauges."""
    families: list[Metric] = []
    for field, (name, label, description) in SPEED_METRICS.items():
        family = GaugeMetricFamily(name, description, labels=[label])
        for key, seconds in getattr(speed, field):
            family.add_metric([str(key)], seconds)
        families.append(family)
    return families


def render_metrics(found: Iterable[tuple[Mapping[str, str], Iterable[Metric]]]) -> bytes:
    """Prometheus' text: metrics of several engines, each with labels that tell whose they are."""
    merged: dict[str, Metric] = {}
    for labels, families in found:
        for family in families:
            new = Metric(family.name, family.documentation, family.type)
            merged.setdefault(family.name, new).samples += [
                sample._replace(labels={**labels, **sample.labels})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]

    class Merged(Collector):
        def collect(self) -> Iterable[Metric]:
            return merged.values()

    registry = CollectorRegistry()
    registry.register(Merged())
    return generate_latest(registry)
