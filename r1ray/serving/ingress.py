"""The HTTP side: a FastAPI application as a Serve deployment that calls the model replicas.

`serve.ingress` copies the application, with everything its routes refer to, when the class is
defined: routes and helpers come before it or from other modules, and the class ends this file.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

from fastapi import Depends, FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from r1ray.errors import ServingError
from r1ray.models import ModelConfig
from r1ray.models.generation import GenerationRequest, TokenEvent
from r1ray.models.tokenizer import Tokenizer
from r1ray.observability.logging import setup_logging
from r1ray.serving.api_keys import ENVIRONMENT_NAME, read_keys, require_key
from r1ray.serving.replica import Failure, compile_forms
from r1ray.serving.responses import add_error_handlers, json_response, read_body, respond
from r1ray.serving.service import CompletionService, ServedModel

__all__ = ["OpenAIIngress", "RemoteModel", "load_served_model"]

PING_TIMEOUT_S = 5.0
KEYED = [Depends(require_key)]

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
add_error_handlers(app)


class RemoteModel:
    """The model replicas behind a Serve handle, as the service wants to see them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._ping = handle.ping
        self._generate = handle.options(stream=True).generate

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[TokenEvent]]:
        """The tokens of `request`; closing the iterator cancels it on the replica.

        Raises:
            ServingError: the one that the replica raised, or 503 when no replica answers.
        """
        response = cast(DeploymentResponseGenerator[Any], self._generate.remote(request))
        finished = False
        try:
            async for item in response:
                if isinstance(item, Failure):
                    raise item.to_error()
                yield item
            finished = True
        except (RayError, RayServeException) as error:
            raise _unavailable("the model replica was lost") from error
        finally:
            if not finished:
                response.cancel()

    async def ping(self) -> None:
        """Return once a replica answers.

        Raises:
            ServingError: 503 when none does in time.
        """
        try:
            await asyncio.wait_for(_result(self._ping.remote()), PING_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise _unavailable("no model replica answers") from error


def load_served_model(model_dir: str, name: str, max_context_tokens: int) -> ServedModel:
    """What the ingress needs of the model directory: tokenizer, end tokens, sizes; no weights."""
    config = ModelConfig.load(model_dir)
    tokenizer = Tokenizer(model_dir)
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        stop_token_ids=frozenset({tokenizer.eos_token_id, *config.eos_token_ids}),
        max_context_tokens=max_context_tokens,
        vocab_size=config.vocab_size,
        created=int(time.time()),
        forms=compile_forms(model_dir),
    )


def _unavailable(message: str) -> ServingError:
    return ServingError(f"{message}; try again later", status=503, code="service_unavailable")


async def _result(response: Any) -> Any:
    return await response


@serve.ingress(app)
class OpenAIIngress:
    """Parses, tokenizes and detokenizes; the model runs in the deployment behind `replicas`."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        *,
        model_dir: str,
        model_name: str,
        max_context_tokens: int,
    ) -> None:
        setup_logging()
        read_keys(os.environ.get(ENVIRONMENT_NAME))  # what is wrong with them is said at once
        self._model = RemoteModel(replicas)
        served = load_served_model(model_dir, model_name, max_context_tokens)
        self._service = CompletionService(served, self._model.generate)

    @app.get("/health")
    async def health(self) -> Response:
        await self._model.ping()
        return json_response({"status": "ok"})

    @app.get("/v1/models", dependencies=KEYED)
    async def list_models(self) -> Response:
        return json_response(self._service.list_models())

    @app.get("/v1/models/{name:path}", dependencies=KEYED)
    async def show_model(self, name: str) -> Response:
        return json_response(self._service.show_model(name))

    @app.post("/tokenize", dependencies=KEYED)
    async def tokenize(self, request: Request) -> Response:
        return json_response(await self._service.tokenize(await read_body(request)))

    @app.post("/detokenize", dependencies=KEYED)
    async def detokenize(self, request: Request) -> Response:
        return json_response(await self._service.detokenize(await read_body(request)))

    @app.post("/v1/chat/completions", dependencies=KEYED)
    async def chat(self, request: Request) -> Response:
        return respond(await self._service.chat(await read_body(request)))

    @app.post("/v1/completions", dependencies=KEYED)
    async def complete(self, request: Request) -> Response:
        return respond(await self._service.complete(await read_body(request)))
