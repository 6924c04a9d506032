"""What is said of replicas that do not answer, by what Ray and Serve say."""

from types import SimpleNamespace
from typing import Any

import pytest

from r1ray.config.serving import EngineConfig, GroupConfig
from r1ray.serving import readiness
from r1ray.serving.readiness import deployment_name, explain_waiting

GROUPS = [
    GroupConfig(name="cpu", num_cpus_per_replica=2),
    GroupConfig(name="npu", resources_per_replica={"NPU": 2}),
]


@pytest.fixture
def _starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of four CPUs, one of them free, and one NPU; replicas that are being started."""
    found: Any = SimpleNamespace(message="", replica_states={"STARTING": 1})
    names = [deployment_name("tiny"), *(deployment_name("tiny", item.name) for item in GROUPS)]
    application = SimpleNamespace(deployments=dict.fromkeys(names, found))
    status = SimpleNamespace(applications={"app": application})
    monkeypatch.setattr(readiness.serve, "status", lambda: status)
    monkeypatch.setattr(readiness.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(readiness.ray, "cluster_resources", lambda: {"CPU": 4.0, "NPU": 1.0})


@pytest.mark.usefixtures("_starting")
def test_each_group_is_told_what_it_waits_for() -> None:
    assert explain_waiting("app", EngineConfig(model_name="tiny", groups=GROUPS)) == (
        "group cpu: a replica is loading the model, or waits for 2 CPU (1 of 4 are free); "
        "group npu: a replica needs 2 NPU and the cluster has 1; lower resources_per_replica.NPU, "
        "or add nodes"
    )


@pytest.mark.usefixtures("_starting")
def test_a_model_without_groups_is_told_as_such() -> None:
    config = EngineConfig(model_name="tiny", num_cpus_per_replica=8)
    assert explain_waiting("app", config) == (
        "a replica needs 8 CPU and the cluster has 4; lower num_cpus_per_replica, or add nodes"
    )


def test_no_model_has_the_deployment_of_anothers_group() -> None:
    assert deployment_name("a-b", "c") != deployment_name("a", "b-c")
