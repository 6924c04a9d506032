"""Which request bodies are accepted, and how the others are refused."""

import dataclasses
import json
from typing import Any

import pytest

from r1ray.errors import ServingError
from r1ray.models.sampling import SamplingParams
from r1ray.serving.openai_schema import ChatRequest, CompletionRequest
from r1ray.serving.parsing import error_body, parse_request
from r1ray.serving.request_rules import Content

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_request(json.dumps(CHAT | fields).encode(), ChatRequest)


def plain(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps(PLAIN | fields).encode(), CompletionRequest)


def refusal(body: bytes, schema: type[Any] = ChatRequest) -> ServingError:
    with pytest.raises(ServingError) as caught:
        parse_request(body, schema)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_those_of_openai() -> None:
    request = chat()
    assert (request.temperature, request.top_p, request.max_tokens) == (1.0, 1.0, None)
    assert (request.stop, request.stream, request.include_usage) == ([], False, False)


def test_all_supported_fields_are_read() -> None:
    request = chat(
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        stop="END",
        seed=-3,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (request.max_tokens, request.stop, request.include_usage) == (5, ["END"], True)
    sampling = request.sampling(0)
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.0, 0.5, -3)


def test_values_that_float32_rounds_to_zero_still_leave_something_to_sample() -> None:
    sampling = chat(temperature=1e-300, top_p=1e-300).sampling(0)
    assert sampling.temperature == 0.0
    assert sampling.top_p == 1e-6


def test_text_parts_are_joined_and_developer_is_a_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}])
    assert request.messages[0].content == Content("ab")


def test_an_answer_can_be_sent_back_as_a_message() -> None:
    answer = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
    assert chat(messages=[answer]).messages[0].content.text == "x"


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"k": "v"}, "store": True},
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"logprobs": False, "tools": None, "response_format": {"type": "text"}},
        {"max_tokens": None, "stop": None, "seed": None, "temperature": None, "stream": None},
        {"max_tokens": 3, "max_completion_tokens": 3},
    ],
)
def test_labels_and_neutral_values_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).model == "m"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 5.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"user": 5}, "user", "invalid_type"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 5}, "model", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "", "name": "x"}]},
            "messages[0].name",
            "unknown_parameter",
        ),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"best_of": 2}, "best_of", "unsupported_value"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "unsupported_value"),
        ({"logprobs": 5}, "logprobs", "invalid_type"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": "x"}, "frequency_penalty", "invalid_type"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"min_p": 1.1}, "min_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 1.5}, "top_k", "invalid_type"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": True}}, "logit_bias", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"response_format": "json"}, "response_format", "invalid_type"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            "response_format",
            "invalid_type",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "invalid_type"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "invalid_type"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "invalid_value"),
        (
            {
                "structured_outputs": {"regex": "a"},
                "response_format": {"type": "json_object"},
            },
            "structured_outputs",
            "invalid_value",
        ),
        ({"prompt": "hi"}, "prompt", "unknown_parameter"),
        ({"typical_p": 0.5}, "typical_p", "unknown_parameter"),
        ({"typical_p": None}, "typical_p", "unknown_parameter"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(json.dumps(CHAT | fields).encode())
    assert (error.param, error.code) == (param, code)
    assert param in str(error)


def test_refusals_say_the_fix() -> None:
    def message(**fields: Any) -> str:
        return str(refusal(json.dumps(CHAT | fields).encode()))

    assert message(best_of=2) == "best_of is not supported; leave best_of out or send 1"
    assert message(temprature=0) == "unknown field temprature: did you mean temperature?"
    assert message(temperature=3) == ("temperature: input should be less than or equal to 2, got 3")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model": ',
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_not_json_are_refused(body: bytes) -> None:
    assert refusal(body).code == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"5"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    assert refusal(body).code == "invalid_type"


def test_prompts_are_text_or_token_ids_alone_or_in_a_list_of_one() -> None:
    assert plain().prompt == plain(prompt=["hi"]).prompt == "hi"
    assert plain(prompt=[1, 2]).prompt == plain(prompt=[[1, 2]]).prompt == [1, 2]


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [True], 5, ["a", "b"], [[1], [2]], [1, "a"]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    error = refusal(json.dumps(PLAIN | {"prompt": prompt}).encode(), CompletionRequest)
    assert error.param == "prompt"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")],
)
def test_error_bodies_have_the_four_fields_of_openai(status: int, kind: str) -> None:
    error = ServingError("why", status=status, code="c", param="p")
    details = {"message": "why", "type": kind, "param": "p", "code": "c"}
    assert error_body(error) == {"error": details}


def test_sampling_fields_reach_the_sampler() -> None:
    fields = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 1,
        "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"7": -100},
        "logprobs": True, "top_logprobs": 3, "seed": 2**63 - 1, "n": 2,
    }  # fmt: skip
    first, second = (chat(**fields).sampling(index) for index in range(2))
    assert first == SamplingParams(
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        logit_bias={7: -100.0},
        num_logprobs=3,
        seed=2**63 - 1,
    )
    assert second == dataclasses.replace(first, seed=-(2**63))
    assert chat(top_k=-1).sampling(0).top_k == 0
    assert chat(logprobs=True).sampling(0).num_logprobs == 0
    assert chat().sampling(0).num_logprobs is None


def test_a_body_may_not_be_nested_without_end() -> None:
    for inner in ("[" * 64 + "]" * 64, '{"a":' * 64 + "1" + "}" * 64, "[" * 100_000):
        error = refusal(b'{"model": "m", "metadata": {"k": ' + inner.encode() + b"}}")
        assert error.code == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"json": "[" * 65 + "]" * 65}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a" * 700] * 100}}, "structured_outputs"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"enum": ["a" * 70_000]}},
                }
            },
            "response_format",
        ),
    ],
)
def test_a_form_has_a_largest_size(fields: dict[str, Any], param: str) -> None:
    error = refusal(json.dumps(CHAT | fields).encode())
    assert (error.param, error.code) == (param, "invalid_value")
    assert len(str(error)) < 300
