"""Images from elsewhere: what is read, and what is refused before it costs anything."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from r1ray.config.images import ImageLimits
from r1ray.errors import ImageError
from r1ray.models.images import read_image, read_png, write_png

LIMITS = ImageLimits()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes whose header says that it has this many pixels, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20), 9)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_format_is_fitted_into_the_square(kind: str) -> None:
    red = Image.new("RGB", (40, 40), (250, 0, 0))

    pixels = read_image(encode(red, kind), 16, LIMITS)

    assert (pixels.shape, pixels.dtype) == ((3, 16, 16), np.uint8)
    assert (pixels[0] > 240).all() and (pixels[1:] < 15).all()  # noqa: PT018


def test_proportions_are_kept_and_the_rest_is_gray() -> None:
    wide = Image.new("RGB", (40, 20), (250, 0, 0))

    pixels = read_image(encode(wide), 16, LIMITS)

    assert (pixels[0, 4:12] == 250).all()
    assert (pixels[:, :4] == 128).all()
    assert (pixels[:, 12:] == 128).all()


def test_gray_of_16_bits_is_scaled_and_not_clipped() -> None:
    levels = np.repeat(np.array([[0, 20_000, 40_000, 65_535]], np.uint16), 4, axis=0)

    pixels = read_image(encode(Image.fromarray(levels)), 4, LIMITS)

    assert pixels[0, 0].tolist() == [0, 20_000 >> 8, 40_000 >> 8, 255]


def test_transparency_shows_gray() -> None:
    clear = Image.new("RGBA", (16, 16), (250, 0, 0, 0))

    assert (read_image(encode(clear), 16, LIMITS) == 128).all()


def test_a_picture_is_turned_as_its_camera_was_held() -> None:
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above
    exif = image.getexif()
    exif[0x0112] = 3  # upside down

    pixels = read_image(encode(image, "PNG", exif=exif), 16, LIMITS)

    assert pixels[:, :8].max() == 0
    assert pixels[:, 8:].min() == 255


def test_a_bomb_is_refused_by_its_header_and_takes_no_memory() -> None:
    data = bomb(30_000, 20_000)
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"far too many pixels|30000 x 20000 pixels"):
        read_image(data, 16, ImageLimits(max_pixels=2**28))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(data) < 10_000
    assert peak < 1 << 20


def test_pixels_beyond_the_limit_are_refused() -> None:
    data = encode(Image.new("RGB", (101, 100)))

    with pytest.raises(ImageError, match="101 x 100 pixels, the most is 10000; make it smaller"):
        read_image(data, 16, ImageLimits(max_pixels=10_000))


def test_bytes_beyond_the_limit_are_refused() -> None:
    with pytest.raises(ImageError, match="65 bytes, the most is 64"):
        read_image(bytes(65), 16, ImageLimits(max_bytes=64))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        encode(Image.new("RGB", (64, 64)), "BMP"),  # a format that is not asked for
        encode(Image.effect_noise((64, 64), 50))[:-400],  # cut off
        bomb(64, 64)[:60],
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be read as one of PNG, JPEG, WEBP, GIF"):
        read_image(data, 16, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(kind: str) -> None:
    data, rng = encode(Image.effect_noise((40, 30), 60), kind), np.random.default_rng(0)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(damaged), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            assert read_image(bytes(damaged), 16, LIMITS).shape == (3, 16, 16)
        except ImageError:
            num_refused += 1

    assert num_refused > 50


def test_png_files_keep_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8)

    assert (read_png(write_png(pixels)) == pixels).all()
