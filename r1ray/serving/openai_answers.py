"""The wire format of answers: OpenAI's, whole and in chunks."""

from typing import Literal

from pydantic import BaseModel

__all__ = [
    "AnswerMessage",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Delta",
    "Detokenized",
    "ErrorBody",
    "ErrorDetails",
    "Health",
    "Model",
    "ModelList",
    "PromptTokensDetails",
    "TokenLogprob",
    "Tokenized",
    "TopLogprob",
    "Usage",
]

Reason = Literal["stop", "length"]


class Health(BaseModel):
    """The answer to GET /health where all is well.

    Attributes:
        versions: of each model, by its name: the directory that the replica that was asked serves.
    """

    status: Literal["ok"] = "ok"
    versions: dict[str, str]


class ErrorDetails(BaseModel):
    """What is wrong, and with which field of the request."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is none."""

    error: ErrorDetails


class Tokenized(BaseModel):
    """The answer to POST /tokenize; `max_model_len` is the context in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(BaseModel):
    """The answer to POST /detokenize."""

    prompt: str


class PromptTokensDetails(BaseModel):
    """Tokens of the prompt whose keys and values were there from an earlier request."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts; the token that ended an answer is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Model(BaseModel):
    """An entry of GET /v1/models."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "r1ray"


class ModelList(BaseModel):
    """GET /v1/models."""

    data: list[Model]
    object: Literal["list"] = "list"


class TopLogprob(BaseModel):
    """A token that could have been chosen.

    Attributes:
        bytes: of the token's text; None where it is a part of a character.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of a chat answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer, or of a piece of it."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, or of a piece of it; offsets are into its text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(BaseModel):
    """The message of a chat answer; what it reasoned, under both names that servers have for it."""

    content: str
    reasoning_content: str | None
    reasoning: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(BaseModel):
    """The answer of a chat completion."""

    message: AnswerMessage
    finish_reason: Reason
    index: int
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """The whole answer to a chat request."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class Delta(BaseModel):
    """What a chunk adds to the answer; absent fields are not sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of the answer of a chat completion."""

    delta: Delta
    finish_reason: Reason | None = None
    index: int
    logprobs: ChatLogprobs | None = None


class ChatChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class CompletionChoice(BaseModel):
    """The answer of a completion, or a piece of it."""

    text: str
    finish_reason: Reason | None = None
    index: int
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """The answer to a completion request, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"
