"""Images in a BatchSet: written with their samples, and found again at their places."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from r1ray.config.prepare import BucketsConfig, ImageSourceConfig, PackingConfig, PrepareConfig
from r1ray.data.batch_set import BatchSet, MicroBatch
from r1ray.data.batch_writer import BatchWriter
from r1ray.data.planners import FixedBuckets, PackingPlanner
from r1ray.data.tokenize_table import sample_schema
from r1ray.models.images import write_png

TOKENS = 3  # of an image
PACKING = PackingConfig(type="packing")
BUCKETS = BucketsConfig(type="buckets")


def _pixels(number: int) -> Any:
    return np.full((3, 8, 8), number, dtype=np.uint8)


def _sample(number: int, num_images: int) -> dict[str, Any]:
    """`number` words with as many images behind the second, which are all of its number."""
    ids = [10 + number] * number
    ids[2:2] = [-1] * (TOKENS * num_images)
    return {
        "input_ids": ids,
        "is_target": [False] * (len(ids) - 1) + [True],
        "images": [write_png(_pixels(number))] * num_images or None,
    }


def _write(folder: Path, batching: BucketsConfig | PackingConfig) -> BatchSet:
    config = PrepareConfig(
        sources=[ImageSourceConfig(type="images", paths=["x"])],
        max_tokens=24,
        batch_tokens=48,
        batching=batching,
    )
    samples = [_sample(number, number % 3) for number in range(4, 16)]
    is_packed = isinstance(batching, PackingConfig)
    planner: Any = PackingPlanner(config) if is_packed else FixedBuckets(config, [12, 24])
    with BatchWriter(folder, planner, config) as writer:
        writer.add(pa.Table.from_pylist(samples, schema=sample_schema(config)))
    (folder / "summary.json").write_text(
        f'{{"max_batch_tokens": {writer.summarize()["max_batch_tokens"]}}}'
    )
    return BatchSet(folder)


def _documents(batch: MicroBatch) -> list[tuple[int, int, int]]:
    """(row, begin, end) of the sample at each image's place."""
    assert batch.images is not None
    if batch.document_lengths is None:
        return [(row, 0, batch.input_ids_BT.shape[1]) for row in batch.images.rows]
    ends = np.cumsum(batch.document_lengths).tolist()
    begins = [0, *ends]
    found = []
    for place in batch.images.places:
        at = next(index for index, end in enumerate(ends) if place < end)
        found.append((0, begins[at], ends[at]))
    return found


@pytest.mark.parametrize("batching", [BUCKETS, PACKING])
def test_every_image_is_at_the_place_of_its_sample(
    tmp_path: Path, batching: BucketsConfig | PackingConfig
) -> None:
    batches = _write(tmp_path, batching)

    num_images = 0
    for index in range(len(batches)):
        batch = batches.read(index, batches.build_buffers())
        if batch.images is None:
            assert (batch.input_ids_BT >= 0).all()
            continue
        num_images += len(batch.images.rows)
        for at, (row, begin, end) in enumerate(_documents(batch)):
            place = batch.images.places[at]
            ids = batch.input_ids_BT[row, begin:end].tolist()
            number = int(batch.images.pixels_I3SS[at, 0, 0, 0])
            assert ids[0] == 10 + number
            assert ids[place - begin : place - begin + TOKENS] == [-1] * TOKENS
            assert (place - begin - 2) % TOKENS == 0
            if batch.images.ends is not None:
                assert batch.images.ends[at] == end
        assert (batch.images.ends is None) == (batch.document_lengths is None)
    assert num_images == sum(number % 3 for number in range(4, 16))
