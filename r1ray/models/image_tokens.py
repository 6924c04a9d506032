"""Where images are in a sequence: marks in a text, and negative ids among its tokens.

No text has negative ids. In a request they are made of the image itself: prompts that differ in an
image differ in tokens, so what is kept of one is not taken for the other.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from r1ray.models.tokenizer import Tokenizer

__all__ = ["IMAGE_MARK", "encode_marked", "image_id", "join_parts"]

IMAGE_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
_ID_BYTES = 7  # of a digest: ids stay far from the ends of int64

EncodedPart = tuple[str, NDArray[np.int32], NDArray[np.int32]]
"""A text, its token ids, and the first character of each."""


def image_id(pixels_3SS: NDArray[np.uint8]) -> int:
    """The id of every position that this image takes: negative, another for another image."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels_3SS).tobytes()).digest()
    return -1 - int.from_bytes(digest[:_ID_BYTES], "big")


def encode_marked(
    tokenizer: Tokenizer, text: str, image_ids: Sequence[int], num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """(ids of a text in which `image_ids` are at its marks, the place of each image).

    Every mark stands for an image: there are as many of both.
    """
    ids: list[int] = []
    places = []
    for index, part in enumerate(text.split(IMAGE_MARK)):
        if index:
            places.append(len(ids))
            ids += [image_ids[index - 1]] * num_image_tokens
        ids += tokenizer.encode(part)
    return ids, places


def join_parts(
    parts: Sequence[EncodedPart], images: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(ids, first character of each) of parts that have an image between each two.

    Args:
        images: id and number of positions of each.
    """
    if len(parts) == 1:
        return parts[0][1:]
    ids, starts, begin = [], [], 0
    for index, (text, part_ids, part_starts) in enumerate(parts):
        if index:
            image, count = images[index - 1]
            ids.append(np.full(count, image, dtype=np.int32))
            starts.append(np.full(count, begin - 1, dtype=np.int32))  # its mark
        ids.append(part_ids)
        starts.append(part_starts + np.int32(begin))
        begin += len(text) + 1
    return np.concatenate(ids), np.concatenate(starts)
