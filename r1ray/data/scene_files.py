"""Scenes and questions as a Parquet file that `prepare` and `evaluate` read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.data.scenes import KINDS, render_scene, write_example
from r1ray.models.images import write_png

__all__ = ["SCENE_SCHEMA", "write_scenes"]

SCENE_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("kind", pa.string()),
    ]
)
_ROWS_AT_ONCE = 256


def write_scenes(path: Path, count: int, *, first_seed: int, image_size: int = 64) -> None:
    """Write `count` questions of all kinds in turn; no seed is used by ranges that are apart."""
    with pq.ParquetWriter(path, SCENE_SCHEMA) as file:
        for start in range(0, count, _ROWS_AT_ONCE):
            rows = []
            for number in range(start, min(start + _ROWS_AT_ONCE, count)):
                kind, seed = KINDS[number % len(KINDS)], first_seed + number
                example = write_example(kind, seed)
                pixels = render_scene(example.scene, size=image_size, seed=seed)
                rows.append(
                    {
                        "image": write_png(pixels.transpose(2, 0, 1)),
                        "question": example.question.text,
                        "answer": example.answer,
                        "kind": kind,
                    }
                )
            file.write_table(pa.Table.from_pylist(rows, schema=SCENE_SCHEMA))
