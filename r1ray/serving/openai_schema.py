"""The wire format of requests: OpenAI's, as far as r1ray speaks them.

1. A request field that r1ray acts on is declared below, with its type and bounds.
2. A known field that it cannot act on is accepted with the values that change nothing
   (`NEUTRAL_VALUES`), and refused with any other.
3. Fields that only label a request are accepted and ignored; every other field is refused, since an
   ignored field would silently change what an answer means.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from r1ray.models.sampling import MAX_LOGPROBS, SamplingParams
from r1ray.serving.request_forms import read_response_format, read_structured_outputs
from r1ray.serving.request_rules import (
    NEUTRAL_IN_MESSAGES,
    NEUTRAL_VALUES,
    Content,
    check_neutral,
    list_biases,
    list_stops,
    read_content,
    single_prompt,
)

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "RequestBase",
    "TokenizeRequest",
]

# Divisors and masses below these are zero in float32 and leave nothing to sample from.
_GREEDY_BELOW = 1e-4
_MIN_TOP_P = 1e-6
_STRICT = ConfigDict(extra="forbid", strict=True)
_MAX_CHOICES = 16


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class RequestBase(BaseModel):
    """What both kinds of request share."""

    model_config = _STRICT

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[int, float], BeforeValidator(list_biases, json_schema_input_type=dict[str, float])
    ] = {}
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] = 1
    # Not OpenAI's, but with the names that other servers of open models have for them.
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    structured_outputs: Annotated[
        str | None,
        BeforeValidator(read_structured_outputs, json_schema_input_type=dict[str, Any]),
    ] = None
    response_format: Annotated[
        str | None, BeforeValidator(read_response_format, json_schema_input_type=dict[str, Any])
    ] = None
    stop: Annotated[
        list[str], BeforeValidator(list_stops, json_schema_input_type=str | list[str])
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    ignore_eos: bool = False
    # Labels: accepted and ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, value in data.items():
            if name in NEUTRAL_VALUES and name not in cls.model_fields:
                check_neutral(name, value)
            elif value is not None or name not in cls.model_fields:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "RequestBase":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options are allowed only with stream: true",
                {"param": "stream_options"},
            )
        return self

    @model_validator(mode="after")
    def _one_form(self) -> "RequestBase":
        if self.structured_outputs is not None and self.response_format is not None:
            raise PydanticCustomError(
                "invalid_value",
                "response_format and structured_outputs both say what an answer is like; send one",
                {"param": "structured_outputs"},
            )
        return self

    @property
    def form(self) -> str | None:
        """What answers have to be like, for `FormCompiler`."""
        return self.structured_outputs or self.response_format

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        """Tokens whose log-probabilities are asked for beside each token's own."""
        return None

    def sampling(self, index: int) -> SamplingParams:
        """How answer `index` of `n` is sampled; values that float32 cannot tell from 0 are safe."""
        return SamplingParams(
            temperature=0.0 if self.temperature < _GREEDY_BELOW else self.temperature,
            top_k=max(self.top_k, 0),
            top_p=max(self.top_p, _MIN_TOP_P),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            num_logprobs=self.num_logprobs,
            seed=None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63,
        )


class TextPart(BaseModel):
    """A piece of a message's text."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """An image inside the request: `data:image/png;base64,...`."""

    model_config = _STRICT

    url: str
    detail: Literal["auto", "low"] | None = None


class ImagePart(BaseModel):
    """An image, which is read before the message's text wherever it stands."""

    model_config = _STRICT

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    """One turn of a conversation; `developer` is OpenAI's newer name of `system`."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Content,
        PlainValidator(read_content, json_schema_input_type=str | list[TextPart | ImagePart]),
    ]
    # Of an earlier answer: accepted and ignored, as reasoning models are trained.
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None or name not in NEUTRAL_IN_MESSAGES
        }


class ChatRequest(RequestBase):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value",
                "top_logprobs are allowed only with logprobs: true",
                {"param": "top_logprobs"},
            )
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise PydanticCustomError(
                    "invalid_value",
                    "max_tokens and max_completion_tokens differ; send one of them",
                    {"param": "max_tokens"},
                )
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(RequestBase):
    """POST /v1/completions."""

    prompt: Annotated[
        str | list[int],
        BeforeValidator(single_prompt, json_schema_input_type=str | list[str] | list[int]),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(BaseModel):
    """POST /tokenize, as vLLM has it: a text, or a chat as the model would get it."""

    model_config = _STRICT

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError(
                "invalid_value", "exactly one of prompt and messages is needed", {"param": "prompt"}
            )
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize, as vLLM has it."""

    model_config = _STRICT

    model: str | None = None
    tokens: list[int]
