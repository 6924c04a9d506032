"""Answers and streams from scripted token events, without a model or a server."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest

from r1ray.errors import ServingError
from r1ray.models.grammar import FormCompiler, json_form, regex_form
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.sampling import SampledToken
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.answering import AnsweringModel, Generate, ServedModel
from r1ray.serving.service import CompletionService
from tests.fakes import EOS_ID, VOCAB_SIZE, write_tiny_model

CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))


class ScriptedModel:
    """Says `text`, then ends, or raises `error`; remembers what it was asked and if it was left."""

    def __init__(self, tokenizer: Tokenizer, text: str, error: ServingError | None = None) -> None:
        self.ids = tokenizer.encode(text)
        self.error = error
        self.requests: list[GenerationRequest] = []
        self.num_left_early = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[TokenEvent]]:
        self.requests.append(request)
        finished = False
        try:
            for token in self.ids:
                yield [TokenEvent(request.request_id, token, None)]
            if self.error is not None:
                raise self.error
            finished = True
            yield [TokenEvent(request.request_id, None, "stop")]
        finally:
            self.num_left_early += not finished


def service_over(
    tokenizer: Tokenizer, model: ScriptedModel, generate: Generate | None = None
) -> CompletionService:
    forms = FormCompiler(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
    served = ServedModel(
        "tiny", tokenizer, frozenset({EOS_ID}), CONTEXT, VOCAB_SIZE, created=1, forms=forms
    )
    return CompletionService([AnsweringModel(served, generate or model.generate)])


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny"} | fields).encode()


def chat_body(content: str = "hi", **fields: Any) -> bytes:
    return body(messages=[{"role": "user", "content": content}], **fields)


async def whole(answer: dict[str, Any] | AsyncIterator[str]) -> dict[str, Any]:
    assert isinstance(answer, dict)
    return answer


async def chunks(answer: dict[str, Any] | AsyncIterator[str]) -> list[dict[str, Any]]:
    assert not isinstance(answer, dict)
    events = [event async for event in answer]
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    assert events[-1] == "data: [DONE]\n\n"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def test_chat_answer_has_text_reason_and_usage(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "two, három")
        answer = await whole(await service_over(tokenizer, model).chat(chat_body()))
        assert answer["object"] == "chat.completion"
        [choice] = answer["choices"]
        assert choice["message"]["content"] == "two, három"
        assert choice["finish_reason"] == "stop"
        num_prompt = len(model.requests[0].prompt_ids)
        assert answer["usage"] == {
            "prompt_tokens": num_prompt,
            "completion_tokens": len(model.ids),
            "total_tokens": num_prompt + len(model.ids),
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        rendered = tokenizer.decode(model.requests[0].prompt_ids)
        assert rendered == "user\nhi\nassistant\n"
        assert model.requests[0].max_new_tokens == CONTEXT - num_prompt

    asyncio.run(main())


def test_chat_stream_carries_role_text_reason_and_usage_in_this_order(
    tokenizer: Tokenizer,
) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "két \u2028 szó")
        fields = {"stream": True, "stream_options": {"include_usage": True}}
        answer = await service_over(tokenizer, model).chat(chat_body(**fields))
        first, *middle, last, usage = await chunks(answer)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle)
        assert text == "két \u2028 szó"
        assert last["choices"][0]["delta"] == {}
        assert last["choices"][0]["finish_reason"] == "stop"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(model.ids)
        assert all(chunk["usage"] is None for chunk in [first, *middle, last])

    asyncio.run(main())


def test_usage_is_absent_from_a_stream_that_did_not_ask_for_it(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        service = service_over(tokenizer, ScriptedModel(tokenizer, "abc"))
        parts = await chunks(await service.complete(body(prompt="x", stream=True)))
        assert "".join(part["choices"][0]["text"] for part in parts) == "abc"
        assert not any("usage" in part for part in parts)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_cuts_the_answer_and_leaves_the_model(
    tokenizer: Tokenizer, stream: bool
) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "one two three")
        request = body(prompt="x", stop=["tw", "zzz"], stream=stream)
        answer = await service_over(tokenizer, model).complete(request)
        parts = await chunks(answer) if stream else [await whole(answer)]
        assert "".join(part["choices"][0]["text"] for part in parts) == "one "
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"
        assert model.num_left_early == 1

    asyncio.run(main())


def test_error_before_the_first_token_has_a_status(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        error = ServingError("full", status=429, code="rate_limit_exceeded")
        service = service_over(tokenizer, ScriptedModel(tokenizer, "", error))
        for stream in (False, True):
            with pytest.raises(ServingError, match="full"):
                await service.chat(chat_body(stream=stream))

    asyncio.run(main())


def test_error_in_the_middle_is_an_event_of_the_stream(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        error = ServingError("the model failed", status=500, code="internal_error")
        service = service_over(tokenizer, ScriptedModel(tokenizer, "abc", error))
        *parts, last = await chunks(await service.chat(chat_body(stream=True)))
        assert len(parts) >= 2
        assert last["error"]["message"] == "the model failed"
        with pytest.raises(ServingError, match="the model failed"):
            await service.chat(chat_body())

    asyncio.run(main())


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_an_answer_can_be_ignored(tokenizer: Tokenizer, ignore_eos: bool) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "a")
        await service_over(tokenizer, model).complete(body(prompt="x", ignore_eos=ignore_eos))
        assert (EOS_ID in model.requests[0].stop_token_ids) is not ignore_eos

    asyncio.run(main())


def test_leaving_a_stream_leaves_the_model(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "one two three")
        stream = await service_over(tokenizer, model).complete(body(prompt="x", stream=True))
        assert isinstance(stream, AsyncGenerator)
        await anext(stream)
        await stream.aclose()
        assert model.num_left_early == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "granted"),
    [([5] * 10, 3, 3), ([5] * 10, None, 16), ([5] * 60, None, 4), ([5] * 60, 4, 4)],
)
def test_default_limit_gives_way_to_the_context(
    tokenizer: Tokenizer, prompt: list[int], max_tokens: int | None, granted: int
) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "a")
        await service_over(tokenizer, model).complete(body(prompt=prompt, max_tokens=max_tokens))
        assert model.requests[0].max_new_tokens == granted

    asyncio.run(main())


@pytest.mark.parametrize(("length", "max_tokens"), [(64, None), (60, 5), (1000, 1), (1, 64)])
def test_prompt_and_answer_longer_than_the_context_are_refused(
    tokenizer: Tokenizer, length: int, max_tokens: int | None
) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "a")
        with pytest.raises(ServingError, match="context is 64 tokens") as caught:
            await service_over(tokenizer, model).complete(
                body(prompt=[5] * length, max_tokens=max_tokens)
            )
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
        assert model.requests == []

    asyncio.run(main())


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_token_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token: int) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "a")
        with pytest.raises(ServingError, match="is not between 0 and 299"):
            await service_over(tokenizer, model).complete(body(prompt=[5, token]))
        assert model.requests == []

    asyncio.run(main())


def test_unknown_model_is_404(tokenizer: Tokenizer) -> None:
    service = service_over(tokenizer, ScriptedModel(tokenizer, ""))
    assert service.list_models()["data"] == [service.show_model("tiny")]
    with pytest.raises(ServingError) as caught:
        service.show_model("other")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    with pytest.raises(ServingError, match="there is no model 'other'"):
        asyncio.run(service.chat(chat_body(model="other")))


def test_a_server_of_several_models_asks_for_a_name(tokenizer: Tokenizer) -> None:
    forms = FormCompiler(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
    one = ServedModel("one", tokenizer, frozenset({EOS_ID}), CONTEXT, VOCAB_SIZE, 1, forms)
    two = dataclasses.replace(one, name="two")
    said = {"one": ScriptedModel(tokenizer, "a"), "two": ScriptedModel(tokenizer, "b")}
    service = CompletionService(
        AnsweringModel(model, said[model.name].generate) for model in (one, two)
    )

    async def main() -> None:
        assert [model["id"] for model in service.list_models()["data"]] == ["one", "two"]
        for name, text in (("one", "a"), ("two", "b")):
            answer = await whole(await service.complete(body(prompt="x", model=name)))
            assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
            tokens = await service.tokenize(body(prompt="x", model=name))
            assert tokens["count"] == 1
        with pytest.raises(ServingError, match="several models; name one of 'one', 'two'"):
            await service.tokenize(b'{"prompt": "x"}')

    asyncio.run(main())


def test_several_answers_have_their_own_numbers_and_seeds(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "two")
        service = service_over(tokenizer, model)
        answer = await whole(await service.chat(chat_body(n=3, seed=5)))
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["two"] * 3
        assert answer["usage"]["completion_tokens"] == 3 * len(model.ids)
        assert [request.sampling.seed for request in model.requests] == [5, 6, 7]
        assert len({request.request_id for request in model.requests}) == 3

        parts = await chunks(await service.chat(chat_body(n=2, stream=True)))
        for index in range(2):
            mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(choice["delta"].get("content", "") for choice in mine) == "two"
            assert [choice["finish_reason"] for choice in mine].count("stop") == 1
            assert mine[-1]["finish_reason"] == "stop"

    asyncio.run(main())


def test_an_answer_that_fails_ends_the_others(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "one two three")
        first = model.generate

        async def generate(request: GenerationRequest) -> AsyncGenerator[Sequence[TokenEvent]]:
            if request.request_id.endswith("-1"):
                raise ServingError("full", status=429)
            async for events in first(request):
                await asyncio.sleep(0.001)
                yield events

        service = service_over(tokenizer, model, generate)
        with pytest.raises(ServingError, match="full"):
            await service.chat(chat_body(n=2))
        assert model.num_left_early == 1

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_told_as_openai_does(tokenizer: Tokenizer, stream: bool) -> None:
    class Telling(ScriptedModel):
        async def generate(
            self, request: GenerationRequest
        ) -> AsyncGenerator[Sequence[TokenEvent]]:
            assert request.sampling.num_logprobs == 1
            async for [event] in super().generate(request):
                if event.token_id is not None:
                    sampled = SampledToken(event.token_id, -0.25, ((event.token_id, -0.25),))
                    event = dataclasses.replace(event, sampled=sampled)
                yield [event]

    async def main() -> None:
        model = Telling(tokenizer, "ab c")
        service = service_over(tokenizer, model)
        answer = await service.chat(chat_body(logprobs=True, top_logprobs=1, stream=stream))
        parts = await chunks(answer) if stream else [await whole(answer)]
        found = [
            item
            for part in parts
            if (logprobs := part["choices"][0]["logprobs"])
            for item in logprobs["content"]
        ]
        texts = [tokenizer.decode([token]) for token in model.ids]
        assert [item["token"] for item in found] == texts
        assert found[0]["bytes"] == list(texts[0].encode())
        assert found[0]["top_logprobs"] == [
            {"token": texts[0], "logprob": -0.25, "bytes": list(texts[0].encode())}
        ]
        answer = await service.complete(body(prompt="x", logprobs=1, stream=stream))
        parts = await chunks(answer) if stream else [await whole(answer)]
        told = [logprobs for part in parts if (logprobs := part["choices"][0]["logprobs"])]
        assert [text for item in told for text in item["tokens"]] == texts
        assert [value for item in told for value in item["token_logprobs"]] == [-0.25] * len(texts)
        assert told[0]["top_logprobs"][0] == {texts[0]: -0.25}
        offsets = [offset for item in told for offset in item["text_offset"]]
        assert offsets == [len("".join(texts[:at])) for at in range(len(texts))]
        plain = await whole(await service.complete(body(prompt="x", logprobs=1)))
        assert plain["choices"][0]["logprobs"] is not None

    asyncio.run(main())


def test_biases_of_tokens_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    service = service_over(tokenizer, ScriptedModel(tokenizer, "a"))
    with pytest.raises(ServingError, match="is not between 0 and 299") as caught:
        asyncio.run(service.chat(chat_body(logit_bias={"300": 5})))
    assert (caught.value.status, caught.value.param) == (400, "logit_bias")


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart_in_chats(tokenizer: Tokenizer, stream: bool) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "<think>\n1 + 1\n</think>\ntwo")
        service = service_over(tokenizer, model)
        history = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho", "reasoning_content": "hm", "reasoning": "hm"},
            {"role": "user", "content": "1 + 1?"},
        ]
        answer = await service.chat(body(messages=history, stream=stream))
        prompt = tokenizer.decode(model.requests[0].prompt_ids)
        assert prompt == "user\nhi\nassistant\nho\nuser\n1 + 1?\nassistant\n"
        parts = await chunks(answer) if stream else [await whole(answer)]
        messages = [part["choices"][0]["delta" if stream else "message"] for part in parts]
        for name in ("reasoning_content", "reasoning"):
            assert "".join(message.get(name) or "" for message in messages) == "1 + 1\n"
        assert "".join(message.get("content") or "" for message in messages) == "two"
        plain = await whole(await service.complete(body(prompt="x")))
        assert plain["choices"][0]["text"].startswith("<think>")

    asyncio.run(main())


def test_texts_and_chats_are_tokenized_and_tokens_are_read_back(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        service = service_over(tokenizer, ScriptedModel(tokenizer, ""))
        found = await service.tokenize(body(prompt="két szó"))
        assert found["tokens"] == tokenizer.encode("két szó")
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), CONTEXT)
        back = await service.detokenize(json.dumps({"tokens": found["tokens"]}).encode())
        assert back == {"prompt": "két szó"}
        chat = await service.tokenize(chat_body("hi"))
        assert tokenizer.decode(chat["tokens"]) == "user\nhi\nassistant\n"
        closed = await service.tokenize(chat_body("hi", add_generation_prompt=False))
        assert tokenizer.decode(closed["tokens"]) == "user\nhi\n"
        for wrong in (body(), chat_body(prompt="x"), body(prompt="x", model="other")):
            with pytest.raises(ServingError):
                await service.tokenize(wrong)
        with pytest.raises(ServingError, match="is not between 0 and 299"):
            await service.detokenize(b'{"tokens": [300]}')

    asyncio.run(main())


def test_forms_reach_the_model_and_wrong_ones_are_refused(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "5")
        service = service_over(tokenizer, model)
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        json_schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        await service.chat(chat_body(response_format=json_schema))
        await service.chat(chat_body(structured_outputs={"json": schema}))
        await service.chat(chat_body(response_format={"type": "json_object"}))
        await service.complete(body(prompt="x", structured_outputs={"regex": "[0-9]+"}))
        await service.chat(chat_body(response_format={"type": "text"}))
        forms = [request.form for request in model.requests]
        assert forms[0] == forms[1] == json_form(schema)
        assert forms[2:] == [json_form({"type": "object"}), regex_form("[0-9]+"), None]
        for name, value in (
            ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}),
            ("structured_outputs", {"regex": "[a"}),
        ):
            with pytest.raises(ServingError, match="no such form") as caught:
                await service.chat(chat_body(**{name: value}))
            assert (caught.value.status, caught.value.param) == (400, name)
        assert len(model.requests) == 5

    asyncio.run(main())
