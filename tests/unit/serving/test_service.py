"""Answers and streams from scripted token events, without a model or a server."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator

import pytest

from r1ray.errors import ServingError
from r1ray.models.grammar import FormCompiler
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.answering import AnsweringModel, ServedModel
from r1ray.serving.service import CompletionService
from tests.fakes import EOS_ID, VOCAB_SIZE
from tests.unit.serving.scripted import (
    CONTEXT,
    ScriptedModel,
    body,
    chat_body,
    chunks,
    service_over,
    whole,
)


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


def test_text_with_a_token_that_the_model_lacks_is_refused(tokenizer: Tokenizer) -> None:
    largest = max(tokenizer.encode("<|im_start|>"))  # a chat's own
    forms = FormCompiler(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
    model = ScriptedModel(tokenizer, "a")
    served = ServedModel("tiny", tokenizer, frozenset({EOS_ID}), CONTEXT, largest, 8, 1, forms)
    service = CompletionService([AnsweringModel(served, model.generate)])
    with pytest.raises(ServingError, match=rf"token id {largest} is not between 0") as caught:
        asyncio.run(service.chat(chat_body("a")))
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(ServingError, match=f"token id {largest} is not between"):
        asyncio.run(service.complete(body(prompt="<|im_start|>")))
    assert not model.requests


def test_a_server_of_several_models_asks_for_a_name(tokenizer: Tokenizer) -> None:
    forms = FormCompiler(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
    one = ServedModel("one", tokenizer, frozenset({EOS_ID}), CONTEXT, VOCAB_SIZE, 8, 1, forms)
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
