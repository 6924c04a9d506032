"""The HTTP side: a FastAPI application as a Serve deployment that calls the model replicas.

`serve.ingress` copies the application, with everything its routes refer to, when the class is
defined: routes and helpers come before it or from other modules, and the class ends this file.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle

from r1ray.config.images import ImageLimits
from r1ray.config.serving import ModelArgs, list_groups
from r1ray.errors import ServingError
from r1ray.models import ModelConfig
from r1ray.models.fusion_file import read_fusion
from r1ray.models.tokenizer import Tokenizer
from r1ray.observability.logging import setup_logging
from r1ray.serving.answering import AnsweringModel, ServedModel
from r1ray.serving.api_keys import ENVIRONMENT_NAME, read_keys, require_key
from r1ray.serving.engine_metrics import render_metrics
from r1ray.serving.following import digest_inputs
from r1ray.serving.openai_answers import Health
from r1ray.serving.openapi import describe_api
from r1ray.serving.playground import read_page
from r1ray.serving.remote import RemoteModel
from r1ray.serving.replica import compile_forms
from r1ray.serving.request_images import Vision, count_image_bytes
from r1ray.serving.responses import (
    MAX_BODY_BYTES,
    add_error_handlers,
    json_response,
    read_body,
    respond,
)
from r1ray.serving.service import CompletionService

__all__ = ["OpenAIIngress", "load_served_model"]

KEYED = [Depends(require_key)]

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
add_error_handlers(app)


def load_served_model(args: ModelArgs) -> ServedModel:
    """What the ingress needs of the model directory: tokenizer, end tokens, sizes; no weights."""
    model_dir = os.path.realpath(args.model_dir)  # of one version, whatever is published meanwhile
    config = ModelConfig.load(model_dir)
    tokenizer = Tokenizer(model_dir)
    return ServedModel(
        name=args.model_name,
        tokenizer=tokenizer,
        stop_token_ids=frozenset({tokenizer.eos_token_id, *config.eos_token_ids}),
        max_context_tokens=args.max_context_tokens,
        vocab_size=config.vocab_size,
        max_open_requests=sum(
            (group.max_replicas or group.num_replicas) * group.max_open_requests
            for group in list_groups(args).values()
        ),
        created=int(time.time()),
        forms=compile_forms(model_dir),
        vision=_load_vision(model_dir, args.images),
        inputs_digest=digest_inputs(model_dir),
    )


def _load_vision(model_dir: str, limits: ImageLimits) -> Vision | None:
    fusion = read_fusion(model_dir)
    if fusion is None:
        return None
    return Vision(fusion.image_size, fusion.num_image_tokens, limits)


@serve.ingress(app)
class OpenAIIngress:
    """Parses, tokenizes and detokenizes; each model runs in a deployment of its own.

    Args:
        replicas: of each model, by its name and those of its groups.
        has_playground: whether there is a page at /.
    """

    def __init__(
        self,
        replicas: Mapping[str, Mapping[str | None, DeploymentHandle]],
        models: Sequence[ModelArgs],
        *,
        has_playground: bool,
    ) -> None:
        setup_logging()
        read_keys(os.environ.get(ENVIRONMENT_NAME))  # what is wrong with them is said at once
        self._page = read_page() if has_playground else None
        limits = [model.images for model in models if read_fusion(model.model_dir) is not None]
        self._max_chat_bytes = MAX_BODY_BYTES + max(map(count_image_bytes, limits), default=0)
        self._models = [RemoteModel(replicas[args.model_name], args) for args in models]
        self._service = CompletionService(
            AnsweringModel(load_served_model(args), model.generate)
            for args, model in zip(models, self._models, strict=True)
        )

    @app.get("/")
    async def playground(self) -> Response:
        if self._page is None:
            raise ServingError("unknown request URL: GET /", status=404, code="unknown_url")
        text, headers = self._page
        return Response(text, media_type="text/html", headers=headers)

    @app.get("/health")
    async def health(self) -> Response:
        found = await asyncio.gather(*[model.probe() for model in self._models])
        names = [model.name for model in self._models]
        return json_response(Health(versions=dict(zip(names, found, strict=True))).model_dump())

    @app.get("/metrics")
    async def metrics(self) -> Response:
        found = await asyncio.gather(*[model.read_metrics() for model in self._models])
        text = render_metrics(item for items in found for item in items)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    async def describe(self) -> Response:
        return json_response(describe_api(self._service.model_names))

    @app.get("/v1/models", dependencies=KEYED)
    async def list_models(self) -> Response:
        return json_response(self._service.list_models())

    @app.get("/v1/models/{name:path}", dependencies=KEYED)
    async def show_model(self, name: str) -> Response:
        return json_response(self._service.show_model(name))

    @app.post("/tokenize", dependencies=KEYED)
    async def tokenize(self, request: Request) -> Response:
        body = await read_body(request, max_bytes=self._max_chat_bytes)
        return json_response(await self._service.tokenize(body))

    @app.post("/detokenize", dependencies=KEYED)
    async def detokenize(self, request: Request) -> Response:
        return json_response(await self._service.detokenize(await read_body(request)))

    @app.post("/v1/chat/completions", dependencies=KEYED)
    async def chat(self, request: Request) -> Response:
        body = await read_body(request, max_bytes=self._max_chat_bytes)
        return respond(await self._service.chat(body))

    @app.post("/v1/completions", dependencies=KEYED)
    async def complete(self, request: Request) -> Response:
        return respond(await self._service.complete(await read_body(request)))
