"""Several replicas and models over HTTP: lost replicas, updates, room that is not there."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from r1ray.config.serving import ModelArgs, ServeConfig
from r1ray.errors import ServingError
from r1ray.serving.app import APP_NAME, ServeArgs, build_app, start_server, stop_server
from tests.e2e.answers import read_metric, read_text
from tests.e2e.processes import free_port, until
from tests.fakes import write_tiny_model

CONTEXT = 8192
LONG: Any = {"temperature": 0, "max_tokens": 3000}
PROMPT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("served"), max_positions=CONTEXT)


@pytest.fixture(scope="module")
def models(model_dir: Path) -> list[ModelArgs]:
    two = ModelArgs(
        model_dir=str(model_dir),
        model_name="two",
        num_replicas=2,
        num_cpus_per_replica=0.5,
        max_concurrency=2,
        max_context_tokens=CONTEXT,
    )
    return [two, replace(two, model_name="one", num_replicas=1)]


@pytest.fixture(scope="module")
def base_url(local_ray: None, models: list[ModelArgs]) -> Iterator[str]:
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    deploy(models)
    yield f"http://127.0.0.1:{port}"
    stop_server()


def deploy(models: list[ModelArgs]) -> None:
    """Returns once the replicas run; those that are to stop may take longer."""
    serve.run(build_app(ServeArgs(models=models)), name=APP_NAME, route_prefix="/")


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=100
    ) as client:
        yield client


def ask(client: openai.OpenAI, content: str = PROMPT, model: str = "two", **fields: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 8} | fields
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **options)


def find_replicas(model: str) -> set[int]:
    """Process ids, as Ray titles the processes."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if title.startswith(f"ray::ServeReplica:{APP_NAME}:engine-{model}"):
            found.add(int(path.parent.name))
    return found


def test_models_of_one_server_answer_by_name(base_url: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["two", "one"]
    answers = {ask(client, model=name).choices[0].message.content for name in ("two", "one")}
    assert len(answers) == 1  # they have the same weights
    running = read_metric(base_url, "r1ray:num_requests_running")
    assert sorted(model for model, _ in running) == ["one", "two", "two"]


def test_a_prompt_goes_to_the_replica_that_knows_its_beginning(
    base_url: str, client: openai.OpenAI
) -> None:
    ask(client)
    for number in range(4):
        answer = ask(client, f"{PROMPT} And {number}?")
        assert answer.usage.prompt_tokens_details.cached_tokens >= 128
    hits = read_metric(base_url, "r1ray:prefix_cache_hits_total")
    assert min(value for (model, _), value in hits.items() if model == "two") == 0


def test_streams_end_whole_while_their_replicas_are_replaced(
    client: openai.OpenAI, models: list[ModelArgs]
) -> None:
    alone = read_text(ask(client, stream=True, **LONG))
    before = find_replicas("two")
    assert len(before) == 2
    streams = [ask(client, stream=True, **LONG) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        texts = [pool.submit(read_text, stream) for stream in streams]
        deploy([replace(model, max_queued_requests=8) for model in models])
        assert [text.result(timeout=100) for text in texts] == [alone, alone]
    until(lambda: find_replicas("two").isdisjoint(before))
    assert ask(client).choices[0].finish_reason == "length"


def test_a_lost_replica_costs_its_own_answers_only(
    base_url: str, client: openai.OpenAI, models: list[ModelArgs]
) -> None:
    until(lambda: len(find_replicas("two")) == 2)
    endless: Any = {"temperature": 0, "max_tokens": 7000, "stream": True}
    stream = ask(client, **endless)
    next(iter(stream))
    running = read_metric(base_url, "r1ray:num_requests_running")
    [busy] = [replica for (model, replica), value in running.items() if value and model == "two"]
    [lost] = [pid for pid in find_replicas("two") if is_replica(pid, busy)]
    os.kill(lost, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the model replica was lost"):
        read_text(stream)
    answers = [ask(client, f"question {number}") for number in range(8)]  # no one waits for it
    assert {answer.choices[0].finish_reason for answer in answers} <= {"length", "stop"}
    assert httpx.get(f"{base_url}/health", timeout=30).status_code == 200
    until(lambda: len(find_replicas("two")) == 2)  # Serve starts another


def is_replica(pid: int, replica: str) -> bool:
    """Whether the process has that replica's id; Serve's logs are named after it."""
    names = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return any(replica in name for name in names)


def test_replicas_come_where_tokens_wait(
    client: openai.OpenAI, base_url: str, models: list[ModelArgs]
) -> None:
    [two, one] = models
    deploy([two, replace(one, max_replicas=2, tokens_per_replica=500)])
    assert len(find_replicas("one")) == 1
    streams = [ask(client, model="one", stream=True, **LONG | {"n": 2}) for _ in range(2)]
    until(lambda: len(find_replicas("one")) == 2)
    for stream in streams:
        stream.close()


def test_why_a_server_does_not_start_is_said(local_ray: None, model_dir: Path) -> None:
    serve.shutdown()
    config = ServeConfig(
        model_name="large",
        port=free_port(),
        num_cpus_per_replica=64,
        max_context_tokens=CONTEXT,
        drain_s=1,  # Serve waits as long for an actor that was never there
    )
    reason = "a replica needs 64 CPU and the cluster has 3;"

    def ask_health() -> str:
        """What a client is told meanwhile."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                answer = httpx.get(f"http://127.0.0.1:{config.port}/health", timeout=20)
            except httpx.HTTPError:  # nobody listens yet
                time.sleep(0.2)
                continue
            if answer.headers["content-type"] == "application/json":
                assert answer.status_code == 503
                return str(answer.json()["error"]["message"])
        return "nothing"

    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(ask_health)
        with pytest.raises(ServingError, match=reason):
            start_server(str(model_dir), config, timeout_s=20)
        assert re.search(f"large does not answer: {reason}", told.result(timeout=1))
