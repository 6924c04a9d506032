"""What answers carry beside their text: several at once, log-probabilities, reasoning, forms."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Sequence

import pytest

from r1ray.errors import ServingError
from r1ray.models.grammar import json_form, regex_form
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.sampling import SampledToken
from r1ray.models.tokenizer import Tokenizer
from tests.fakes import EOS_ID
from tests.unit.serving.scripted import (
    CONTEXT,
    ScriptedModel,
    body,
    chat_body,
    chunks,
    service_over,
    whole,
)


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


@pytest.mark.parametrize("stream", [True, False])
def test_more_answers_than_there_are_places_are_refused(tokenizer: Tokenizer, stream: bool) -> None:
    async def main() -> None:
        model = ScriptedModel(tokenizer, "a")
        service = service_over(tokenizer, model)
        with pytest.raises(ServingError, match=r"n \(9\) is above the 8 answers") as caught:
            await service.chat(chat_body(n=9, stream=stream))
        assert (caught.value.status, caught.value.param) == (400, "n")
        assert not model.requests

    asyncio.run(main())


def test_texts_and_chats_are_tokenized_and_tokens_are_read_back(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        service = service_over(tokenizer, ScriptedModel(tokenizer, ""))
        found = await service.tokenize(body(prompt="két szó"))
        assert found["tokens"] == tokenizer.encode("két szó")
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), CONTEXT)
        back = await service.detokenize(json.dumps({"tokens": found["tokens"]}).encode())
        assert back == {"prompt": "két szó"}
        ended = await service.detokenize(json.dumps({"tokens": [EOS_ID]}).encode())
        assert ended == {"prompt": tokenizer.eos_token}
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
