"""The images of a chat: decoded from its URLs, within limits, and put into the prompt.

Only data URLs are read. A server that fetched what a request names would let anyone reach what the
server can reach.
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1ray.config.images import ImageLimits
from r1ray.errors import ImageError, ServingError
from r1ray.models.image_tokens import IMAGE_MARK
from r1ray.models.images import read_image
from r1ray.serving.openai_schema import ChatMessage

__all__ = ["Vision", "count_image_bytes", "mark_images", "read_images"]

_PREFIX, _ENCODING = "data:image/", ";base64"


@dataclass(frozen=True)
class Vision:
    """How a model sees images.

    Attributes:
        image_size: pixels on a side that images are fitted into.
        num_image_tokens: positions that an image takes.
    """

    image_size: int
    num_image_tokens: int
    limits: ImageLimits


def count_image_bytes(limits: ImageLimits) -> int:
    """Of the URLs of as many and as large images as a request may have."""
    return limits.max_images * (limits.max_bytes * 4 // 3 + 128)


def read_images(
    messages: Sequence[ChatMessage], vision: Vision | None, model_name: str
) -> list[NDArray[np.uint8]]:
    """The images of all messages in their order, uint8 [3, S, S] each.

    Args:
        vision: None where the model reads text.
    Raises:
        ServingError: 400, with the part at fault as `param`.
    """
    found: list[NDArray[np.uint8]] = []
    for at, message in enumerate(messages):
        for part, url in message.content.images:
            param = f"messages[{at}].content[{part}].image_url"
            if vision is None:
                problem = f"the model {model_name!r} reads text alone; leave images out"
                raise _refuse(problem, param, "unsupported_value")
            if message.role != "user":
                problem = f"{param}: images are for user messages, not for {message.role}"
                raise _refuse(problem, param, "invalid_value")
            if len(found) == vision.limits.max_images:
                problem = f"{param}: the most is {vision.limits.max_images} images a request"
                raise _refuse(problem, param, "invalid_value")
            try:
                data = _decode(url, vision.limits)
                found.append(read_image(data, vision.image_size, vision.limits))
            except ImageError as error:
                raise _refuse(f"{param}: {error}", param, "invalid_value") from error
    return found


def mark_images(at: int, message: ChatMessage, *, has_images: bool) -> str:
    """The text of message number `at`, with a mark for each of its images in front.

    Args:
        has_images: whether any message has some; a text must then not have marks of its own.
    Raises:
        ServingError: 400; the text has the mark.
    """
    content = message.content
    if has_images and IMAGE_MARK in content.text:
        param = f"messages[{at}].content"
        problem = f"{param} has the character U+{ord(IMAGE_MARK):04X}, which stands for an image"
        raise _refuse(f"{problem}; remove it", param, "invalid_value")
    return IMAGE_MARK * len(content.images) + content.text


def _decode(url: str, limits: ImageLimits) -> bytes:
    """The bytes of a data URL."""
    header, comma, text = url.partition(",")
    if not header.startswith(_PREFIX):
        raise ImageError(
            f"this server fetches nothing; send the image itself, as {_PREFIX}png{_ENCODING},..., "
            f"not {url[:40]!r}"
        )
    if not comma or not header.endswith(_ENCODING):
        raise ImageError(f"a data URL begins like {_PREFIX}png{_ENCODING},; got {header[:40]!r}")
    if len(text) * 3 // 4 > limits.max_bytes + 2:
        raise ImageError(
            f"the image has about {len(text) * 3 // 4} bytes, the most is {limits.max_bytes}; "
            "compress it or make it smaller"
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data URL is not base64 ({error})") from error


def _refuse(message: str, param: str, code: str) -> ServingError:
    return ServingError(message, status=400, code=code, param=param)
