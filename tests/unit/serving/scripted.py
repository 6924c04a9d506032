"""A model that says what it is told to, and request bodies for it."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from r1ray.errors import ServingError
from r1ray.models.grammar import FormCompiler
from r1ray.models.requests import GenerationRequest, TokenEvent
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.answering import AnsweringModel, Generate, ServedModel
from r1ray.serving.request_images import Vision
from r1ray.serving.service import CompletionService
from tests.fakes import EOS_ID, VOCAB_SIZE

__all__ = ["CONTEXT", "ScriptedModel", "body", "chat_body", "chunks", "service_over", "whole"]

CONTEXT = 64


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
    tokenizer: Tokenizer,
    model: ScriptedModel,
    generate: Generate | None = None,
    vision: Vision | None = None,
) -> CompletionService:
    forms = FormCompiler(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
    served = ServedModel(
        "tiny",
        tokenizer,
        frozenset({EOS_ID}),
        CONTEXT,
        VOCAB_SIZE,
        max_open_requests=8,
        created=1,
        forms=forms,
        vision=vision,
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
