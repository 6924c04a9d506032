"""Answering one model's requests: rendering, limits, detokenization and streaming.

1. A request's prompt is tokenized on a thread of its own: a long one must not stall the streams of
   others.
2. The model's token events become text (`AnswerText`), and text becomes one answer or a stream.
3. A stream starts only when the model has answered once, so that errors until then have an HTTP
   status; later ones are sent as an event of the stream.
"""

import asyncio
import json
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterable,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from r1ray.errors import ServingError, ShapeError
from r1ray.models.grammar import FormCompiler
from r1ray.models.image_tokens import IMAGE_MARK, encode_marked, image_id
from r1ray.models.requests import GenerationRequest, RequestImage, TokenEvent
from r1ray.models.tokenizer import Tokenizer
from r1ray.serving.answer_text import AnswerText, Piece, join_pieces
from r1ray.serving.answers import AnswerFormat, ChatFormat, CompletionFormat
from r1ray.serving.merging import merge_streams
from r1ray.serving.openai_answers import (
    Detokenized,
    Model,
    PromptTokensDetails,
    Tokenized,
    Usage,
)
from r1ray.serving.openai_schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestBase,
    TokenizeRequest,
)
from r1ray.serving.parsing import error_body
from r1ray.serving.reasoning import opens_reasoning
from r1ray.serving.request_images import Vision, mark_images, read_images

__all__ = ["Answer", "AnsweringModel", "Generate", "ServedModel"]

Answer = dict[str, Any] | AsyncIterator[str]
"""A JSON value, or the events of a stream as text."""

Generate = Callable[[GenerationRequest], AsyncGenerator[Sequence[TokenEvent]]]
"""Streams the tokens of a request; closing the iterator cancels it. Raises ServingError."""

DEFAULT_COMPLETION_TOKENS = 16
DONE = "data: [DONE]\n\n"
Value = TypeVar("Value")


@dataclass(frozen=True)
class ServedModel:
    """What the service knows about the model: its name, limits and tokenizer.

    Attributes:
        max_context_tokens: prompt and answer of one request together.
        vocab_size: of the model; token ids must be below it.
        max_open_requests: that all replicas take together, running and waiting.
        forms: what says whether a form is one.
        created: seconds since the epoch, shown in /v1/models.
        vision: how it sees images; None where it reads text.
        inputs_digest: of the files by which requests are made; None where replicas cannot differ.
    """

    name: str
    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]
    max_context_tokens: int
    vocab_size: int
    max_open_requests: int
    created: int
    forms: FormCompiler
    vision: Vision | None = None
    inputs_digest: bytes | None = None


@dataclass(frozen=True)
class _Prompt:
    """A chat as the model gets it, and its text."""

    text: str
    ids: list[int]
    images: tuple[RequestImage, ...] = ()


@dataclass
class _Exchange:
    """One request on its way to an answer."""

    request: RequestBase
    prompt_ids: list[int]
    max_new_tokens: int
    format: AnswerFormat
    images: Sequence[RequestImage] = ()
    texts: list[AnswerText] = field(default_factory=list)  # one for each answer

    @property
    def usage(self) -> Usage:
        num_prompt, num_new = len(self.prompt_ids), sum(text.num_tokens for text in self.texts)
        num_cached = self.texts[0].num_cached if self.texts else 0
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_new,
            total_tokens=num_prompt + num_new,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )


class AnsweringModel:
    """Answers the requests for one model."""

    def __init__(self, model: ServedModel, generate: Generate) -> None:
        self._model = model
        self._generate = generate
        # One thread: the tokenizer's encoder is not safe to share.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="r1ray-encode")

    @property
    def name(self) -> str:
        """What requests call it."""
        return self._model.name

    def describe(self) -> Model:
        """As /v1/models has it."""
        return Model(id=self._model.name, created=self._model.created)

    async def chat(self, request: ChatRequest) -> Answer:
        """Answer a chat; ServingError says what is wrong with it."""
        prompt = await self._in_thread(lambda: self._encode_chat(request.messages, opens=True))
        is_open = opens_reasoning(prompt.text)
        if is_open and request.form is not None:
            raise ServingError(
                "this model's chat template opens <think>, and a form would hold for the "
                "reasoning; use /v1/completions, or leave response_format and structured_outputs "
                "out",
                status=400,
                code="unsupported_value",
                param="response_format",
            )
        limit = self._limit(len(prompt.ids), request.max_tokens, default=None, param="messages")
        answer_format = ChatFormat(
            f"chatcmpl-{uuid.uuid4().hex}",
            self._model.name,
            has_logprobs=request.num_logprobs is not None,
            is_open=is_open,
        )
        return await self._answer(
            _Exchange(request, prompt.ids, limit, answer_format, prompt.images)
        )

    async def complete(self, request: CompletionRequest) -> Answer:
        """Continue a text; ServingError says what is wrong with it."""
        prompt_ids = await self._in_thread(lambda: self._encode_prompt(request.prompt))
        limit = self._limit(
            len(prompt_ids), request.max_tokens, default=DEFAULT_COMPLETION_TOKENS, param="prompt"
        )
        answer_format = CompletionFormat(
            f"cmpl-{uuid.uuid4().hex}",
            self._model.name,
            has_logprobs=request.num_logprobs is not None,
        )
        return await self._answer(_Exchange(request, prompt_ids, limit, answer_format))

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or chat; ServingError says what is wrong with the request."""
        if request.messages is None:
            prompt = request.prompt or ""
            tokens = await self._in_thread(lambda: self._model.tokenizer.encode(prompt))
        else:
            messages, opens = request.messages, request.add_generation_prompt
            chat = await self._in_thread(lambda: self._encode_chat(messages, opens=opens))
            if chat.images:
                raise ServingError(
                    "images have no token ids to show; send the text alone",
                    status=400,
                    code="invalid_value",
                    param="messages",
                )
            tokens = chat.ids
        context = self._model.max_context_tokens
        return Tokenized(count=len(tokens), max_model_len=context, tokens=tokens).model_dump()

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens; ServingError says what is wrong with the request."""
        self._check_tokens(request.tokens, param="tokens")
        text = await self._in_thread(lambda: self._model.tokenizer.spell(request.tokens))
        return Detokenized(prompt=text).model_dump()

    async def _in_thread(self, compute: Callable[[], Value]) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, compute)

    def _encode_chat(self, chat: Sequence[ChatMessage], *, opens: bool) -> "_Prompt":
        """The prompt of a chat; `opens` adds the header of the next answer."""
        vision, tokenizer = self._model.vision, self._model.tokenizer
        pixels = read_images(chat, vision, self._model.name)
        text = self._render(chat, opens=opens, has_images=bool(pixels))
        if vision is None or not pixels:
            return _Prompt(text, self._encode_text(text, param="messages"))
        if text.count(IMAGE_MARK) != len(pixels):
            raise ServingError(
                "the model's chat template leaves out or repeats a message that has an image; "
                "send the image in the last message",
                status=400,
                code="invalid_value",
                param="messages",
            )
        image_ids = [image_id(image) for image in pixels]
        ids, places = encode_marked(tokenizer, text, image_ids, vision.num_image_tokens)
        return _Prompt(text, ids, tuple(map(RequestImage, pixels, places)))

    def _render(self, chat: Sequence[ChatMessage], *, opens: bool, has_images: bool) -> str:
        """The text of a chat, with a mark for each image."""
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": mark_images(at, message, has_images=has_images),
            }
            for at, message in enumerate(chat)
        ]
        try:
            return self._model.tokenizer.render_chat(messages, add_generation_prompt=opens)
        except Tokenizer.template_errors as error:
            raise ServingError(
                f"the model's chat template does not accept these messages ({error})",
                status=400,
                code="invalid_value",
                param="messages",
            ) from error

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._encode_text(prompt, param="prompt")
        self._check_tokens(prompt, param="prompt")
        return prompt

    def _encode_text(self, text: str, *, param: str) -> list[int]:
        """A tokenizer may know tokens, added to it alone, that the model does not."""
        token_ids = self._model.tokenizer.encode(text)
        self._check_tokens(token_ids, param=param)
        return token_ids

    def _check_tokens(self, token_ids: Iterable[int], *, param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._model.vocab_size:
                raise ServingError(
                    f"token id {token_id} is not between 0 and {self._model.vocab_size - 1}",
                    status=400,
                    code="invalid_value",
                    param=param,
                )

    def _limit(
        self, num_prompt: int, requested: int | None, *, default: int | None, param: str
    ) -> int:
        """New tokens a request may have; a default gives way to the context, a wish does not."""
        room = self._model.max_context_tokens - num_prompt
        if room < (requested or 1):
            raise ServingError(
                f"the prompt has {num_prompt} tokens and at least {requested or 1} more are to "
                f"follow, but the context is {self._model.max_context_tokens} tokens; shorten the "
                "prompt or lower max_tokens",
                status=400,
                code="context_length_exceeded",
                param=param,
            )
        return requested or min(room, default or room)

    async def _answer(self, exchange: _Exchange) -> Answer:
        request = exchange.request
        self._check_tokens(request.logit_bias, param="logit_bias")
        if request.n > (most := self._model.max_open_requests):
            raise ServingError(
                f"n ({request.n}) is above the {most} answers that this server takes at once; "
                "lower it",
                status=400,
                code="invalid_value",
                param="n",
            )
        if request.form is not None:
            await self._check_form(request.form, request)
        exchange.texts = [AnswerText(self._model.tokenizer, request.stop) for _ in range(request.n)]
        pieces = merge_streams([self._pieces(exchange, index) for index in range(request.n)])
        if request.stream:
            return self._stream(exchange, await anext(pieces), pieces)
        found: list[list[Piece]] = [[] for _ in exchange.texts]
        async with aclosing(pieces):
            async for index, piece in pieces:
                found[index].append(piece)
        return exchange.format.whole(list(map(join_pieces, found)), exchange.usage)

    async def _check_form(self, form: str, request: RequestBase) -> None:
        try:
            await self._in_thread(lambda: self._model.forms.start(form))
        except ShapeError as error:
            names = ("structured_outputs", "response_format")
            param = next(name for name in names if getattr(request, name) is not None)
            raise ServingError(
                f"{param}: {error}", status=400, code="invalid_value", param=param
            ) from error

    async def _pieces(self, exchange: _Exchange, index: int) -> AsyncGenerator[Piece]:
        """One answer, piece by piece; pieces may be empty, and there is at least one."""
        text = exchange.texts[index]
        generation = GenerationRequest(
            request_id=f"{exchange.format.id}-{index}",
            prompt_ids=exchange.prompt_ids,
            max_new_tokens=exchange.max_new_tokens,
            stop_token_ids=self._stop_token_ids(exchange.request),
            sampling=exchange.request.sampling(index),
            form=exchange.request.form,
            images=exchange.images,
            inputs_digest=self._model.inputs_digest,
        )
        async with aclosing(self._generate(generation)) as batches:
            async for events in batches:
                yield text.push(events)
                if text.finish_reason is not None:
                    return
        raise ServingError("the model's answer broke off", status=500, code="internal_error")

    def _stop_token_ids(self, request: RequestBase) -> frozenset[int]:
        return frozenset() if request.ignore_eos else self._model.stop_token_ids

    async def _stream(
        self,
        exchange: _Exchange,
        first: tuple[int, Piece],
        rest: AsyncGenerator[tuple[int, Piece]],
    ) -> AsyncIterator[str]:
        include_usage = exchange.request.include_usage
        answer_format = exchange.format

        def event(chunk: dict[str, Any]) -> str:
            if include_usage:
                chunk.setdefault("usage", None)
            return _sse(chunk)

        try:
            async with aclosing(rest):
                for index in range(len(exchange.texts)):
                    for chunk in answer_format.opening(index):
                        yield event(chunk)
                for chunk in answer_format.chunks(*first):
                    yield event(chunk)
                async for item in rest:
                    for chunk in answer_format.chunks(*item):
                        yield event(chunk)
            if include_usage:
                yield _sse(answer_format.usage(exchange.usage))
        except ServingError as error:
            yield _sse(error_body(error))
        yield DONE


def _sse(value: dict[str, Any]) -> str:
    # ASCII only: some clients take U+2028 for the end of a line.
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
