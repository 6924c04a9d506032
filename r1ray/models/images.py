"""Images from elsewhere: read within limits, fitted into the encoder's square.

1. Too many bytes are refused; then the header alone is read, which says format and size.
2. Too many pixels are refused before any is decoded: a few kilobytes can be gigapixels.
3. What is decoded is turned as its camera was held, made RGB, and fitted into the square with its
   proportions kept; the rest of the square is gray.

Price: some 20 ms a megapixel, and 12 bytes a pixel meanwhile.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from r1ray.config.images import ImageLimits
from r1ray.errors import ImageError

__all__ = ["read_image", "read_png", "write_png"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_GRAY = (128, 128, 128)


def read_image(data: bytes, size: int, limits: ImageLimits) -> NDArray[np.uint8]:
    """The image in `data`, uint8 [3, size, size]: red, green and blue.

    Raises:
        ImageError: it is beyond the limits, of another format, or damaged.
    """
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"the image has {len(data)} bytes, the most is {limits.max_bytes}; compress it or make "
            "it smaller"
        )
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise _too_large(f"{width} x {height}", limits)
            fitted = _fit(_to_rgba(ImageOps.exif_transpose(image)), size)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("far too many", limits) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise whatever they do
        formats = ", ".join(_FORMATS)
        raise ImageError(
            f"the image cannot be read as one of {formats} ({type(error).__name__}: {error})"
        ) from error
    return np.ascontiguousarray(np.asarray(fitted, dtype=np.uint8).transpose(2, 0, 1))


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # gray of 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGBA")


def _fit(image: Image.Image, size: int) -> Image.Image:
    """`image`, RGBA, in the middle of a gray square."""
    small = ImageOps.contain(image, (size, size))
    square = Image.new("RGBA", (size, size), (*_GRAY, 255))
    square.alpha_composite(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square.convert("RGB")


def read_png(data: bytes) -> NDArray[np.uint8]:
    """The pixels, uint8 [3, S, S], that `write_png` wrote."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def write_png(pixels_3SS: NDArray[np.uint8]) -> bytes:
    """`pixels_3SS` as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels_3SS.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def _too_large(pixels: str, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"the image has {pixels} pixels, the most is {limits.max_pixels}; make it smaller"
    )
