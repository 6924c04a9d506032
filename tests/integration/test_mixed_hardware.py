"""One application over groups of replicas: two speeds of CPUs, and an accelerator in name."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import cloudpickle, serve

import tests.integration.test_mixed_hardware as this_module
from r1ray.config.serving import GroupConfig, ModelArgs
from r1ray.models.backend import DecoderBackend
from r1ray.serving import app
from r1ray.serving.app import APP_NAME, ServeArgs, build_app, stop_server
from r1ray.serving.replica import ModelReplica
from tests.e2e.processes import free_port, until
from tests.fakes import write_tiny_model

CONTEXT = 1024
STEP_S = 0.05


class SlowInGroupSlow(ModelReplica):
    """Takes its time for every forward, in the group of that name."""

    def __init__(self, args: ModelArgs, group: str | None = None) -> None:
        if group == "slow":
            compute = DecoderBackend.next_logits

            def next_logits(self: DecoderBackend, *arguments: Any) -> Any:
                time.sleep(STEP_S)
                return compute(self, *arguments)

            DecoderBackend.next_logits = next_logits  # type: ignore[method-assign]
        super().__init__(args, group)


def group(name: str, **fields: Any) -> GroupConfig:
    sizes = {"num_cpus_per_replica": 0.5, "max_concurrency": 2, "max_queued_requests": 2}
    return GroupConfig(name=name, **(sizes | fields))


@pytest.fixture(scope="module")
def base_url(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The fast group is the one that asks for the accelerator."""
    model_dir = write_tiny_model(tmp_path_factory.mktemp("served"), max_positions=CONTEXT)
    groups = [group("slow"), group("npu", resources_per_replica={"NPU": 1})]
    model = ModelArgs(
        model_dir=str(model_dir), model_name="tiny", groups=groups, max_context_tokens=CONTEXT
    )
    cloudpickle.register_pickle_by_value(this_module)
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "ModelReplica", SlowInGroupSlow)
        application = build_app(ServeArgs(models=[model]))
    serve.run(application, name=APP_NAME, route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    stop_server()
    cloudpickle.unregister_pickle_by_value(this_module)


def ask(base_url: str, *prompts: str, max_tokens: int = 8) -> list[httpx.Response]:
    """The answers to all of them, asked at once."""

    async def answer() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            bodies = [
                {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
                for prompt in prompts
            ]
            return await asyncio.gather(
                *[client.post("/v1/completions", json=body) for body in bodies]
            )

    return asyncio.run(answer())


def read_metric(base_url: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Values with their labels."""
    text = httpx.get(f"{base_url}/metrics", timeout=30).raise_for_status().text
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    return [(sample.labels, sample.value) for sample in samples if sample.name == name]


def count_answers(base_url: str) -> Counter[str]:
    """By group."""
    found = Counter[str]()
    for labels, value in read_metric(base_url, "r1ray:request_success_total"):
        found[labels["group"]] += round(value)
    return found


def find_replica(name: str) -> Any:
    """The actor of a group's replica."""
    [found] = [
        item["name"]
        for item in ray.util.list_named_actors(all_namespaces=True)
        if f"@{name}#" in item["name"]
    ]
    return ray.get_actor(found, namespace="serve")


def test_requests_go_to_the_fast_group_until_it_is_full(base_url: str) -> None:
    [first] = ask(base_url, "a short prompt")
    assert first.status_code == 200, first.text
    assert count_answers(base_url) == {"npu": 1}
    steps = read_metric(base_url, "r1ray:measured_step_seconds")
    alone = {labels["group"]: value for labels, value in steps if labels["sequences"] == "1"}
    assert alone["slow"] >= STEP_S > alone["npu"]
    # Two are decoded and two wait there; the others would be refused.
    answers = ask(base_url, *[f"number {number}" for number in range(7)], max_tokens=60)
    assert [answer.status_code for answer in answers] == [200] * 7
    after = count_answers(base_url)
    assert after["npu"] >= 5
    assert after["slow"] >= 1
    assert after["npu"] + after["slow"] == 8


def test_a_lost_accelerator_leaves_the_others_answering(base_url: str) -> None:
    before = count_answers(base_url)["slow"]
    lost = find_replica("npu")
    ray.kill(lost, no_restart=True)
    answers = [ask(base_url, f"and then {number}")[0] for number in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert count_answers(base_url)["slow"] >= before + 1
    # Serve starts another, which counts from zero and is preferred as soon as it has measured.
    until(lambda: ask(base_url, "again") and count_answers(base_url)["npu"])
