"""Rows with images from Parquet files, each usable or with the reason why not.

As `r1ray.data.sources` reads text: what is wrong with a row, its images included, is its reason for
quarantine. Images are decoded here once, within the limits, and go on as PNG files of the encoder's
size: what comes later is small, and known to be readable.

Price: decoding, some 20 ms a megapixel.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from r1ray.config.images import ImageLimits
from r1ray.config.prepare import ImageSourceConfig
from r1ray.data.schemas import COLUMNS
from r1ray.data.sources import (
    MAX_ROW_BYTES,
    check_row,
    read_values,
    rows_to_table,
    text_bytes,
)
from r1ray.errors import ArtifactError, ImageError
from r1ray.models.images import read_image, write_png

__all__ = ["list_images", "read_image_file"]

_ROWS_AT_ONCE = 16


def read_image_file(path: str, source: ImageSourceConfig, size: int) -> Iterator[pa.Table]:
    """Tables of `sources.ROW_SCHEMA` with every row of the Parquet file `path`, in order.

    Args:
        size: pixels on a side that images are fitted into.
    Raises:
        ArtifactError: the file as a whole cannot be read, or lacks the column.
    """
    try:
        filesystem, inner = (
            fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
        )
        with filesystem.open_input_file(inner) as stream:
            file = pq.ParquetFile(stream)
            names, column = file.schema_arrow.names, source.image_column
            if column not in names:
                raise ArtifactError(
                    f"{path}: has no column {column!r} of images, only {', '.join(names)}; name it "
                    "in image_column"
                )
            wanted = [column, *(name for name in COLUMNS if name in names and name != column)]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                rows = []
                for row, error, shown in read_values(batch):
                    checked = check_row(row, error, shown) if error else _check(row, source, size)
                    rows.append({"source": path, "row": number, **checked})
                    number += 1
                yield rows_to_table(rows)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def _check(row: dict[str, Any], source: ImageSourceConfig, size: int) -> dict[str, Any]:
    """The columns of one row."""
    found = row.pop(source.image_column)
    images: list[bytes] = []
    error = None
    try:
        images = [
            write_png(read_image(data, size, source.limits))
            for data in list_images(found, source.image_column, source.limits)
        ]
    except ImageError as problem:
        error = str(problem)
    if text_bytes(row) > MAX_ROW_BYTES:
        error = f"row is longer than {MAX_ROW_BYTES} bytes"
    checked = check_row(row, error, row)
    return checked if checked.get("error") else {**checked, "images": images}


def list_images(found: Any, column: str, limits: ImageLimits) -> list[bytes]:
    """The encoded images of a value of the column: bytes, a struct that has them, or a list.

    Raises:
        ImageError: there are none, or too many.
    """
    values = found if isinstance(found, list) else [found]
    if len(values) > limits.max_images:
        raise ImageError(f"{len(values)} images, the most is {limits.max_images}")
    found_files = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    files = [data for data in found_files if isinstance(data, bytes)]
    if not files or len(files) < len(values):
        raise ImageError(f"column {column!r} has no bytes of an image")
    return files
