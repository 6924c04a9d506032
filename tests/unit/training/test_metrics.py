"""What workers export to Ray's metrics."""

from dataclasses import fields
from typing import Any

import pytest

from r1ray.observability.metrics import TRAIN_METRICS
from r1ray.training import metrics
from r1ray.training.step import StepRecord


class FakeMetric:
    names: list[str]

    def __init__(self, name: str, **_: Any) -> None:
        self.names.append(name)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        return None


def test_every_metric_is_a_field_of_the_step_record() -> None:
    assert {metric.field for metric in TRAIN_METRICS} <= {item.name for item in fields(StepRecord)}


def test_what_all_workers_share_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Counter", FakeMetric)
    monkeypatch.setattr(metrics, "Gauge", FakeMetric)
    exported = []
    for rank in range(2):
        FakeMetric.names = []
        metrics.StepMetrics("run", rank)
        exported.append(set(FakeMetric.names))
    assert exported[0] == {metric.name for metric in TRAIN_METRICS}
    assert "r1ray_train_tokens" in exported[0] - exported[1]
    assert "r1ray_train_sent_bytes" in exported[1]
