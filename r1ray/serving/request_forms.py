"""What form an answer is asked to have: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from typing import Any

from pydantic_core import PydanticCustomError

from r1ray.files import parse_json
from r1ray.models.grammar import choice_form, json_form, regex_form

__all__ = ["read_response_format", "read_structured_outputs"]

_OUTER = {"type", "json_schema"}
_INNER = {"name", "description", "schema", "strict"}
_KINDS = ("json", "regex", "choice")
_MAX_FORM_CHARS = 1 << 16  # compiling takes up to 10 µs a character


def read_response_format(value: Any) -> str | None:
    """{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": ...}."""
    if not isinstance(value, dict) or not value.keys() <= _OUTER:
        raise PydanticCustomError("invalid_type", "must be an object with a type")
    kind, outer = value.get("type"), value.get("json_schema")
    if kind not in ("text", "json_object", "json_schema"):
        raise PydanticCustomError(
            "invalid_value", "must be of type text, json_object or json_schema"
        )
    if kind != "json_schema":
        if outer is not None:
            raise PydanticCustomError("invalid_value", "has a json_schema only with that type")
        return None if kind == "text" else json_form({"type": "object"})
    if not isinstance(outer, dict) or not outer.keys() <= _INNER:
        raise PydanticCustomError(
            "invalid_value", "must have a json_schema of name, description, schema and strict"
        )
    return _check_size(json_form(_read_schema(outer.get("schema", {}))))


def read_structured_outputs(value: Any) -> str:
    """{"json": SCHEMA}, {"regex": PATTERN} or {"choice": [TEXT, ...]}."""
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _KINDS:
        raise PydanticCustomError(
            "invalid_value", "must be an object with exactly one of json, regex and choice"
        )
    [(kind, wanted)] = value.items()
    return _check_size(_build_form(kind, wanted))


def _build_form(kind: str, wanted: Any) -> str:
    if kind == "json":
        return json_form(_read_schema(wanted))
    if kind == "regex":
        if not isinstance(wanted, str):
            raise PydanticCustomError("invalid_type", "must have a string as its regex")
        return regex_form(wanted)
    if not isinstance(wanted, list) or not wanted or not all(map(_is_text, wanted)):
        raise PydanticCustomError("invalid_type", "must have a list of strings as its choice")
    return choice_form(wanted)


def _check_size(form: str) -> str:
    if len(form) > _MAX_FORM_CHARS:
        raise PydanticCustomError(
            "invalid_value", f"must not ask for a form of more than {_MAX_FORM_CHARS} characters"
        )
    return form


def _read_schema(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise PydanticCustomError("invalid_value", "must have valid JSON as schema") from error
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must have an object as its schema")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
