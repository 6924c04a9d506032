"""From the bytes of a request to a checked request, and from an error to OpenAI's error body."""

import difflib
import json
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from r1ray.errors import ServingError
from r1ray.files import parse_json
from r1ray.serving.openai_answers import ErrorBody, ErrorDetails
from r1ray.serving.request_rules import NEUTRAL_VALUES

__all__ = ["error_body", "parse_request"]

RequestT = TypeVar("RequestT", bound=BaseModel)

_INVALID_TYPE_SUFFIXES = ("_type", "_parsing", "int_from_float")


def parse_request(body: bytes, schema: type[RequestT]) -> RequestT:
    """The request in `body`, checked against `schema`.

    Raises:
        ServingError: 400, with the field at fault as `param`, when the body is not a JSON object or
            the object is not such a request.
    """
    data = _parse_object(body)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise _explain(error, schema) from error


def error_body(error: ServingError) -> dict[str, Any]:
    """OpenAI's JSON body of `error`."""
    kind: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    if error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
    details = ErrorDetails(message=str(error), type=kind, param=error.param, code=error.code)
    return ErrorBody(error=details).model_dump()


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        data = parse_json(body.decode("utf-8"), parse_constant=_refuse_constant)
        # Half of a surrogate pair is valid JSON, but no text that a tokenizer takes.
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise ServingError(
            f"the request body is not valid JSON ({error})", status=400, code="invalid_json"
        ) from error
    if not isinstance(data, dict):
        raise ServingError(
            f"the request body must be a JSON object, got {_shorten(data)}",
            status=400,
            code="invalid_type",
        )
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _explain(error: ValidationError, schema: type[BaseModel]) -> ServingError:
    """The first problem that pydantic found, in OpenAI's terms."""
    item = error.errors(include_url=False)[0]
    param = item.get("ctx", {}).get("param") or _dotted(item["loc"])
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        names = [*schema.model_fields, *NEUTRAL_VALUES]
        close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close and len(item["loc"]) == 1 else "leave it out"
        return _invalid(f"unknown field {_shorten(param)}: {hint}", param, "unknown_parameter")
    if kind == "missing":
        return _invalid(f"the field {param} is required", param, "missing_required_parameter")
    if kind in ("invalid_type", "invalid_value", "unsupported_value"):
        prefix = "" if param in message else f"{param} "
        return _invalid(prefix + message, param, kind)
    code = "invalid_type" if kind.endswith(_INVALID_TYPE_SUFFIXES) else "invalid_value"
    message = message[:1].lower() + message[1:]
    return _invalid(f"{param}: {message}, got {_shorten(item['input'])}", param, code)


def _invalid(message: str, param: str, code: str) -> ServingError:
    return ServingError(message, status=400, code=code, param=param)


def _dotted(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _shorten(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."
