"""Limits of images that come from elsewhere."""

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

__all__ = ["ImageLimits"]


@dataclass(
    frozen=True,
    kw_only=True,
    slots=True,
    config=ConfigDict(extra="forbid", use_attribute_docstrings=True),
)
class ImageLimits:
    """What an image may be before it is decoded; others are refused."""

    max_images: Annotated[int, Field(ge=1, le=256)] = 4
    """Images of one row or request."""
    max_bytes: Annotated[int, Field(ge=64, le=2**28)] = 4 << 20
    """Encoded bytes of one image."""
    max_pixels: Annotated[int, Field(ge=64, le=2**28)] = 16_000_000
    """Width times height of one image, as its header says; decoding takes 12 bytes for each."""
