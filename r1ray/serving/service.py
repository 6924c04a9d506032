"""Request bodies and the models that answer them, whatever runs these."""

from collections.abc import Iterable
from typing import Any

from r1ray.errors import ServingError
from r1ray.serving.answering import Answer, AnsweringModel
from r1ray.serving.openai_answers import ModelList
from r1ray.serving.openai_schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from r1ray.serving.parsing import parse_request

__all__ = ["CompletionService"]


class CompletionService:
    """Answers with the model that a request names; ServingError says what is wrong with one."""

    def __init__(self, models: Iterable[AnsweringModel]) -> None:
        self._models = {model.name: model for model in models}

    @property
    def model_names(self) -> list[str]:
        return list(self._models)

    def list_models(self) -> dict[str, Any]:
        """The body of GET /v1/models."""
        return ModelList(data=[model.describe() for model in self._models.values()]).model_dump()

    def show_model(self, name: str) -> dict[str, Any]:
        """The body of GET /v1/models/{name}."""
        return self._find(name, param=None).describe().model_dump()

    async def chat(self, body: bytes) -> Answer:
        """Answer a chat."""
        request = parse_request(body, ChatRequest)
        return await self._find(request.model, param="model").chat(request)

    async def complete(self, body: bytes) -> Answer:
        """Continue a text."""
        request = parse_request(body, CompletionRequest)
        return await self._find(request.model, param="model").complete(request)

    async def tokenize(self, body: bytes) -> dict[str, Any]:
        """The tokens of a text or chat."""
        request = parse_request(body, TokenizeRequest)
        return await self._find(request.model, param="model").tokenize(request)

    async def detokenize(self, body: bytes) -> dict[str, Any]:
        """The text of tokens."""
        request = parse_request(body, DetokenizeRequest)
        return await self._find(request.model, param="model").detokenize(request)

    def _find(self, name: str | None, *, param: str | None) -> AnsweringModel:
        """The model of that name; without a name, the only one there is."""
        names = ", ".join(map(repr, self._models))
        if name is None:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            raise ServingError(
                f"this server has several models; name one of {names} in 'model'",
                status=400,
                code="missing_required_parameter",
                param=param,
            )
        if name not in self._models:
            raise ServingError(
                f"there is no model {name[:80]!r}; this server has {names}",
                status=404,
                code="model_not_found",
                param=param,
            )
        return self._models[name]
