"""The API in the terms of OpenAPI, for /openapi.json: made from the types that requests go through.

FastAPI cannot make it, since routes read bodies themselves to answer with errors of OpenAI's shape.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from r1ray import __version__
from r1ray.serving.openai_answers import (
    ChatCompletion,
    Completion,
    Detokenized,
    ErrorBody,
    Health,
    Model,
    ModelList,
    Tokenized,
)
from r1ray.serving.openai_schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

__all__ = ["describe_api"]

_POSTS: dict[str, tuple[str, type[BaseModel], type[BaseModel]]] = {
    "/v1/chat/completions": ("Answer a chat.", ChatRequest, ChatCompletion),
    "/v1/completions": ("Continue a text.", CompletionRequest, Completion),
    "/tokenize": ("The tokens of a text or chat.", TokenizeRequest, Tokenized),
    "/detokenize": ("The text of tokens.", DetokenizeRequest, Detokenized),
}
_STREAMED = (ChatCompletion, Completion)
_ERRORS = {
    "400": "Something is wrong with the request; `param` names it.",
    "401": "An API key is needed.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "429": "The queue is full; Retry-After says when to try again.",
    "500": "The model failed on this request.",
    "503": "No replica answers.",
    "504": "The request took too long.",
}


def describe_api(model_names: Sequence[str]) -> dict[str, Any]:
    """An OpenAPI 3.1 document of a server with these models."""
    requests = [request for _, request, _ in _POSTS.values()]
    answers = [answer for _, _, answer in _POSTS.values()]
    answers += [ModelList, Model, Health, ErrorBody]
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in (*requests, *answers)],
        ref_template="#/components/schemas/{model}",
    )
    schemas = definitions["$defs"]
    for request in requests:
        schemas[request.__name__]["properties"]["model"] = {"enum": list(model_names)}
    paths: dict[str, Any] = {
        path: {"post": _post(*described)} for path, described in _POSTS.items()
    }
    paths["/v1/models"] = {"get": _get("The models of this server.", ModelList)}
    paths["/v1/models/{name}"] = {
        "get": _get("One of them.", Model)
        | {
            "parameters": [
                {
                    "name": "name",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                }
            ]
        }
    }
    paths["/health"] = {"get": _get("Whether every model computes.", Health)}
    paths["/metrics"] = {
        "get": {
            "summary": "What the engines do, for Prometheus.",
            "responses": {"200": {"description": "Metrics.", "content": {"text/plain": {}}}},
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "r1ray", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(summary: str, request: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    body = {"required": True, "content": _json(request)}
    return _get(summary, answer) | {"requestBody": body}


def _get(summary: str, answer: type[BaseModel]) -> dict[str, Any]:
    content = _json(answer)
    if answer in _STREAMED:
        content["text/event-stream"] = {}
    errors = {
        status: {"description": text, "content": _json(ErrorBody)}
        for status, text in _ERRORS.items()
    }
    return {
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": content}, **errors},
        "security": [{"key": []}, {}],
    }


def _json(kind: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"application/json": {"schema": reference}}
