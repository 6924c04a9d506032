"""Rules for request fields that types and bounds alone do not state.

Each raises `PydanticCustomError` with one of OpenAI's codes as its type, which `parsing` turns into
an error body.
"""

from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

__all__ = [
    "NEUTRAL_IN_MESSAGES",
    "NEUTRAL_VALUES",
    "Content",
    "check_neutral",
    "list_biases",
    "list_stops",
    "read_content",
    "single_prompt",
]

# Values that ask for nothing beyond what r1ray does; null is neutral for each of them too.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "prediction": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# What a client adds when it sends an earlier answer back as a message.
NEUTRAL_IN_MESSAGES = (
    "annotations",
    "audio",
    "function_call",
    "name",
    "refusal",
    "tool_calls",
)
_MAX_STOPS = 4
_MOST_BIAS = 100


@dataclass(frozen=True)
class Content:
    """What a message says.

    Attributes:
        text: its text parts, joined as they are.
        images: number of the part and URL of each image.
    """

    text: str
    images: tuple[tuple[int, str], ...] = ()


def read_content(value: Any) -> Content:
    """A message's content: a string, or parts that are texts and images."""
    if isinstance(value, str):
        return Content(value)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("invalid_type", "must be a string or a list of parts")
    texts, images = [], []
    for index, part in enumerate(value):
        keys = part.keys() if isinstance(part, dict) else set()
        if keys == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str):
            texts.append(part["text"])
        elif keys == {"type", "image_url"} and part["type"] == "image_url":
            images.append((index, _read_image_url(part["image_url"])))
        else:
            raise PydanticCustomError(
                "invalid_value",
                'only text and image parts are supported, each exactly {"type": "text", "text": '
                '"..."} or {"type": "image_url", "image_url": {"url": "data:image/..."}}',
            )
    return Content("".join(texts), tuple(images))


def _read_image_url(value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise PydanticCustomError("invalid_type", 'image_url must be {"url": "data:image/..."}')
    if value.keys() - {"url", "detail"} or value.get("detail") not in (None, "auto", "low"):
        raise PydanticCustomError(
            "unsupported_value",
            "image_url may have a url, and a detail of auto or low: all images are seen at the "
            "model's one size",
        )
    return str(value["url"])


def list_stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("invalid_type", "must be a string or a list of strings")
    if len(stops) > _MAX_STOPS:
        raise PydanticCustomError("invalid_value", f"at most {_MAX_STOPS} stop strings are allowed")
    if not all(stops):
        raise PydanticCustomError("invalid_value", "a stop string must not be empty")
    return stops


def list_biases(value: Any) -> Any:
    """From token id to bias; the ids are text in JSON."""
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object of token ids and biases")
    biases = {}
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit()):
            raise PydanticCustomError("invalid_value", "must have token ids as its names")
        if type(bias) not in (int, float) or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise PydanticCustomError(
                "invalid_value", f"must have values between -{_MOST_BIAS} and {_MOST_BIAS}"
            )
        biases[int(token)] = float(bias)
    return biases


def single_prompt(value: Any) -> Any:
    """A text or its token ids; also as the only element of a list, as OpenAI's batches have it."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError(
                "unsupported_value", "one prompt a request is supported; send several requests"
            )
        value = value[0]
    is_ids = isinstance(value, list) and all(type(item) is int for item in value)
    if not isinstance(value, str) and not is_ids:
        raise PydanticCustomError("invalid_type", "must be a string or a list of token ids")
    if not value:
        raise PydanticCustomError("invalid_value", "must not be empty")
    return value


def check_neutral(name: str, value: Any) -> None:
    """Raise unless `value` asks for nothing; 1 and true are not the same value here."""
    allowed = NEUTRAL_VALUES[name]
    if value is None or any(type(value) is type(item) and value == item for item in allowed):
        return
    fix = f"leave {name} out" + (f" or send {allowed[0]!r}" if allowed else "")
    raise PydanticCustomError(
        "unsupported_value", f"{name} is not supported; {fix}", {"param": name}
    )
