"""The served tiny model over HTTP, through the openai client and httpx."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from r1ray.config.serving import ServeConfig
from r1ray.serving.app import start_server, stop_server
from tests.e2e.processes import free_port, until
from tests.fakes import write_tiny_model
from tests.requirements import needs

VERSION = "one"  # name of the model directory
MODEL = "tiny"
CONTEXT = 8192
MAX_CONCURRENCY = 2
MAX_QUEUED = 2
MESSAGES: Any = [{"role": "user", "content": "hello there"}]
# Seconds of decoding: the greedy answer of this random model goes in circles and never ends.
ENDLESS: dict[str, Any] = {
    "model": MODEL,
    "messages": MESSAGES,
    "temperature": 0,
    "max_tokens": CONTEXT - 100,
}


@pytest.fixture(scope="module")
def base_url(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("served") / VERSION
    model_dir = write_tiny_model(directory, max_positions=CONTEXT)
    config = ServeConfig(
        model_name=MODEL,
        port=free_port(),
        max_concurrency=MAX_CONCURRENCY,
        max_queued_requests=MAX_QUEUED,
        max_context_tokens=CONTEXT,
    )
    yield start_server(str(model_dir), config)
    stop_server()


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=60
    ) as client:
        yield client


def test_the_playground_is_at_the_root(http: httpx.Client) -> None:
    found = http.get("/")
    assert found.status_code == 200
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert "<title>r1ray playground</title>" in found.text


def ask(client: openai.OpenAI, content: str = "hello there", **fields: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 24} | fields
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def text_of(answer: Any) -> str:
    content = answer.choices[0].message.content
    assert isinstance(content, str)
    return content


def read_metrics(http: httpx.Client) -> dict[str, float]:
    """Values by name; of all labels together."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def count_requests(http: httpx.Client) -> tuple[int, int]:
    """(requests running, requests waiting), as of the latest step."""
    found = read_metrics(http)
    return int(found["r1ray:num_requests_running"]), int(found["r1ray:num_requests_waiting"])


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["message"]


def test_health_and_models(client: openai.OpenAI, http: httpx.Client) -> None:
    health = http.get("/health")
    assert (health.status_code, health.json()) == (
        200,
        {"status": "ok", "versions": {MODEL: VERSION}},
    )
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "r1ray"


def test_chat_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=400)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 400
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 400
    usage = {"include_usage": True}
    parts = list(ask(client, max_tokens=400, stream=True, stream_options=usage))
    pieces = [part.choices[0].delta.content or "" for part in parts[:-1]]
    assert "".join(pieces) == text_of(answer)
    assert len([piece for piece in pieces if piece]) > 3
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage == answer.usage


def test_completion_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": "the quick", "temperature": 0, "max_tokens": 20}
    answer = client.completions.create(**fields)
    parts = client.completions.create(**fields, stream=True)
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    del fields["max_tokens"]
    by_default = client.completions.create(**fields)
    assert by_default.usage is not None
    assert by_default.usage.completion_tokens == 16


def test_stream_is_server_sent_events_ending_in_done(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "stream": True}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


@needs(shutil.which("curl") is not None, "NO CURL: it is NOT TESTED")
def test_curl_gets_an_answer_and_a_stream(base_url: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    url = f"{base_url}/v1/chat/completions"

    def curl(fields: dict[str, Any]) -> str:
        header = ["-H", "Content-Type: application/json"]
        command = ["curl", "-sSN", "--fail", "-m", "30", url, *header, "-d", json.dumps(fields)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    answer = json.loads(curl(body))["choices"][0]
    events = curl(body | {"stream": True}).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == answer["message"]["content"]


def test_seed_reproduces_a_sample(client: openai.OpenAI) -> None:
    first, again, other = (
        text_of(ask(client, temperature=1.0, top_p=0.9, seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again != other


def test_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = text_of(ask(client))
    stop = text[8:11]  # longer than most tokens, so it spans several
    answer = ask(client, stop=[stop])
    assert text_of(answer) == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24
    streamed = ask(client, stop=stop, stream=True)
    pieces = [part.choices[0].delta.content or "" for part in streamed]
    assert "".join(pieces) == text_of(answer)


def test_a_beginning_that_was_read_before_is_not_read_again(client: openai.OpenAI) -> None:
    text = "the quick brown fox jumps over the lazy dog. " * 30
    first, again = ask(client, text, max_tokens=8), ask(client, text, max_tokens=8)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 128 < cached < first.usage.prompt_tokens
    assert text_of(first) == text_of(again)


def test_several_answers_with_log_probabilities(client: openai.OpenAI) -> None:
    answer = ask(client, n=2, temperature=1.0, seed=3, logprobs=True, top_logprobs=2, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 6
        assert all(item.logprob <= 0 for item in choice.logprobs.content)
        assert [len(item.top_logprobs) for item in choice.logprobs.content] == [2] * 6
    again = ask(client, n=2, temperature=1.0, seed=3, max_tokens=6)
    assert [choice.message.content for choice in again.choices] == [
        choice.message.content for choice in answer.choices
    ]
    assert again.usage.completion_tokens == 12


def test_an_answer_has_the_form_that_was_asked_for(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer_format = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema}}
    answer = ask(client, response_format=answer_format, max_tokens=60)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(text_of(answer))["ok"] in (True, False)
    chosen = ask(client, extra_body={"structured_outputs": {"choice": ["left", "right"]}})
    assert text_of(chosen) in ("left", "right")
    with pytest.raises(openai.BadRequestError, match="no such form"):
        ask(client, extra_body={"structured_outputs": {"regex": "(("}})


def test_texts_are_tokenized_and_read_back(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "hello there"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    back = http.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "hello there"}


def test_errors_have_the_shape_of_openai(http: httpx.Client) -> None:
    chat: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
    url = "/v1/chat/completions"
    check_error(http.post(url, content=b'{"model": '), 400, "invalid_json", None)
    check_error(http.post(url, json=["a"]), 400, "invalid_type", None)
    check_error(http.post(url, json=chat | {"max_tokens": "5"}), 400, "invalid_type", "max_tokens")
    check_error(http.post(url, json=chat | {"top_q": 5}), 400, "unknown_parameter", "top_q")
    check_error(http.post(url, json=chat | {"best_of": 2}), 400, "unsupported_value", "best_of")
    check_error(http.post(url, json=chat | {"model": "gpt"}), 404, "model_not_found", "model")
    check_error(http.post(url, content=b"[" * 2_000_000), 413, "request_too_large", None)
    check_error(http.get("/v1/models/gpt"), 404, "model_not_found", None)
    check_error(http.get("/v1/nothing"), 404, "unknown_url", None)
    check_error(http.get("/docs"), 404, "unknown_url", None)
    check_error(http.get(url), 405, "method_not_supported", None)


def test_prompt_over_the_context_is_refused_by_the_client_library(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, content="x y " * CONTEXT)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, max_tokens=CONTEXT)
    assert caught.value.code == "context_length_exceeded"


def test_concurrent_requests_get_the_answers_they_get_alone(client: openai.OpenAI) -> None:
    contents = [f"question {index} " * (index + 1) for index in range(4)]
    alone = [text_of(ask(client, content)) for content in contents]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda content: text_of(ask(client, content)), contents))
    assert together == alone


def test_clients_that_leave_free_their_memory(
    base_url: str, client: openai.OpenAI, http: httpx.Client
) -> None:
    with (
        httpx.Client(base_url=base_url, timeout=60) as leaving,
        leaving.stream("POST", "/v1/chat/completions", json=ENDLESS | {"stream": True}) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()  # httpx leaves when this iterator is dropped
        next(lines)
        assert count_requests(http) == (1, 0)
    until(lambda: count_requests(http) == (0, 0))
    with (
        httpx.Client(base_url=base_url, timeout=0.5) as leaving,
        pytest.raises(httpx.ReadTimeout),
    ):
        leaving.post("/v1/chat/completions", json=ENDLESS)
    until(lambda: count_requests(http) == (0, 0))
    assert text_of(ask(client))


def test_full_queue_answers_429_with_retry_after(base_url: str, http: httpx.Client) -> None:
    capacity = MAX_CONCURRENCY + MAX_QUEUED
    leave = threading.Event()

    def occupy() -> None:
        with httpx.Client(base_url=base_url, timeout=60) as busy:
            stream = busy.stream("POST", "/v1/chat/completions", json=ENDLESS | {"stream": True})
            with stream as response:
                for _ in response.iter_lines():
                    if leave.is_set():
                        return

    with ThreadPoolExecutor(capacity) as pool:
        occupied = [pool.submit(occupy) for _ in range(capacity)]
        until(lambda: sum(count_requests(http)) == capacity)
        response = http.post("/v1/chat/completions", json=ENDLESS)
        leave.set()
        for future in occupied:
            future.result(timeout=60)
    check_error(response, 429, "rate_limit_exceeded", None)
    assert response.headers["retry-after"] == "1"
    until(lambda: count_requests(http) == (0, 0))
