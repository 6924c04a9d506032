"""Grafana's dashboard: every query is of metrics that are exported, and panels do not overlap."""

import itertools

from prometheus_client.parser import text_string_to_metric_families

from r1ray.models.requests import GeneratorStats
from r1ray.observability.metrics import TRAIN_METRICS
from r1ray.serving.engine_metrics import EngineMetrics, render_metrics
from tests.dashboard import named_metrics, read_panels


def _served() -> set[str]:
    metrics = EngineMetrics()
    metrics.note_token(0.1, is_first=True)
    metrics.note_token(0.1, is_first=False)
    metrics.note_answer("stop", 1.0)
    metrics.note_failure(429)
    stats = GeneratorStats(0, 0, 0, 0.0, 1.0, 0, 0, 0, 0)
    labels = {"model_name": "m", "replica": "r"}
    text = render_metrics([(labels, metrics.read(stats))]).decode()
    families = text_string_to_metric_families(text)
    return {sample.name for family in families for sample in family.samples}


def test_every_query_is_of_metrics_that_are_exported() -> None:
    served = _served()
    trained = {
        f"ray_{metric.name}{'_total' if metric.kind == 'counter' else ''}"
        for metric in TRAIN_METRICS
    }
    named = named_metrics()
    assert all(named)
    assert set().union(*named) <= served | trained
    shown = {name.removeprefix("r1ray:") for name in set().union(*named) & served}
    assert {"num_requests_running", "kv_cache_usage_perc", "sparse_kv_share"} <= shown


def test_panels_have_titles_and_places_of_their_own() -> None:
    panels = read_panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] for panel in panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        is_apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert is_apart
