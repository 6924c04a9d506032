"""What workers export to Ray's metrics."""

from dataclasses import fields
from typing import Any

import pytest

from r1ray.observability.metrics import TRAIN_METRICS
from r1ray.training import metrics
from r1ray.training.step import StepRecord


class FakeMetric:
    """A counter or a gauge; `values` has what all of them were given, by name and rank."""

    values: dict[tuple[str, str], float]

    def __init__(self, name: str, **_: Any) -> None:
        self._name = name

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self._key = self._name, tags["rank"]
        self.values[self._key] = 0

    def inc(self, value: float) -> None:
        self.values[self._key] += value


class FakeGauge(FakeMetric):
    def set(self, value: float) -> None:
        self.values[self._key] = value


@pytest.fixture(autouse=True)
def values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    monkeypatch.setattr(metrics, "Counter", FakeMetric)
    monkeypatch.setattr(metrics, "Gauge", FakeGauge)
    FakeMetric.values = {}
    return FakeMetric.values


def test_every_metric_is_a_field_of_the_step_record() -> None:
    assert {metric.field for metric in TRAIN_METRICS} <= {item.name for item in fields(StepRecord)}


@pytest.mark.parametrize("is_local", [False, True])
def test_what_all_workers_share_is_exported_once(
    values: dict[tuple[str, str], float], is_local: bool
) -> None:
    record = StepRecord(
        *(1, 2.5, 1e-3, 1.0, 100, 50, False, "fp32", 1.0, 0, 0.5, 0.1, 7, 8, 0.0, 0),
        is_local=is_local,
    )
    for rank in range(2):
        exporter = metrics.StepMetrics("run", rank)
        exporter.observe(record)
        exporter.observe(record)

    names = {name for name, rank in values if rank == "0"}
    assert names == {metric.name for metric in TRAIN_METRICS}
    assert ("r1ray_train_loss", "1") not in values
    tokens = [values["r1ray_train_tokens", rank] for rank in "01"]
    assert tokens == ([200, 200] if is_local else [200, 0])
    assert [values["r1ray_train_sent_bytes", rank] for rank in "01"] == [14, 14]
