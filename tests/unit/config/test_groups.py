"""Groups of replicas: what they may be, and what they are to whoever runs them."""

from typing import Any

import pytest
from pydantic import ValidationError

from r1ray.config import load_config
from r1ray.config.serving import EngineConfig, GroupConfig, ServeConfig, list_groups
from r1ray.errors import ConfigError

DEMO = "jobs/configs/demo.yaml"


def engine(**fields: Any) -> EngineConfig:
    return EngineConfig(model_name="tiny", **fields)


def test_without_groups_the_model_is_its_only_one() -> None:
    config = engine(num_replicas=3)
    assert list_groups(config) == {None: config}


def test_a_group_is_the_model_with_its_own_replicas() -> None:
    config = ServeConfig(
        model_name="tiny",
        max_context_tokens=512,
        port=9000,
        groups=[
            GroupConfig(name="a", num_replicas=2, resources_per_replica={"NPU": 1}),
            GroupConfig(name="b", backend="openvino", kv_cache="int8"),
        ],
    )
    found = list_groups(config)
    assert list(found) == ["a", "b"]
    expected = ServeConfig(
        model_name="tiny",
        max_context_tokens=512,
        port=9000,
        num_replicas=2,
        resources_per_replica={"NPU": 1},
    )
    assert found["a"] == expected
    assert (found["b"].backend, found["b"].kv_cache, found["b"].num_replicas) == (
        *("openvino", "int8"),
        1,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": [{"name": "a"}, {"name": "a"}]}, "have a name twice"),
        ({"groups": [{"name": "a"}], "num_replicas": 2}, r"num_replicas \(2\) beside groups"),
        ({"groups": [{"name": "a", "kv_cach": "int8"}]}, "kv_cach"),
        ({"device": "cuda"}, "device cuda needs num_gpus_per_replica"),
        ({"device": "cpu", "num_gpus_per_replica": 1}, r"num_gpus_per_replica \(1\) would be idle"),
        ({"device": "intel_npu"}, "backend native runs on auto, cpu, cuda, not on"),
        ({"backend": "openvino", "device": "cuda"}, "backend openvino runs on auto, cpu, intel"),
        ({"backend": "openvino", "num_gpus_per_replica": 1}, "would be idle: backend openvino"),
        ({"backend": "openvino", "budget_mib": 64}, r"budget_mib \(64\) goes with backend native"),
        ({"backend": "openvino", "attention": "sparse"}, "openvino attends densely"),
        (
            {"groups": [{"name": "a", "backend": "openvino"}], "attention": "sparse"},
            "openvino attends densely",
        ),
        ({"resources_per_replica": {"NPU": 0}}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        engine(**fields)


def test_a_budget_of_a_group_goes_with_weights_that_are_streamed() -> None:
    with pytest.raises(ConfigError, match=r"budget_mib goes with .* w8a8, not .* w4a8"):
        load_config(DEMO, ["serve.groups=[{name: a, budget_mib: 512}]", "compress.scheme=w4a8"])
