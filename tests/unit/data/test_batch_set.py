import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.batch_set import (
    BATCH_SCHEMA,
    BATCHES_NAME,
    IGNORED,
    SUMMARY_NAME,
    BatchSet,
    plan_order,
)
from r1ray.errors import ArtifactError, ShapeError


def _row(ceiling: int, *samples: tuple[list[int], list[bool]]) -> dict[str, Any]:
    return {
        "ceiling": ceiling,
        "lengths": [len(ids) for ids, _ in samples],
        "input_ids": [token for ids, _ in samples for token in ids],
        "is_target": [flag for _, flags in samples for flag in flags],
    }


def _write(directory: Path, rows: list[dict[str, Any]], group: int = 2) -> BatchSet:
    table = pa.Table.from_pylist(rows, schema=BATCH_SCHEMA)
    pq.write_table(table, directory / BATCHES_NAME, row_group_size=group)
    (directory / SUMMARY_NAME).write_text(json.dumps({"num_batches": len(rows)}))
    return BatchSet(directory)


def test_a_batch_is_padded_and_its_labels_are_shifted_and_masked(tmp_path: Path) -> None:
    row = _row(
        6,
        ([11, 12, 13, 14], [False, False, True, True]),
        ([21, 22], [False, True]),
        ([31, 32, 33, 34, 35, 36], [True, True, False, True, False, True]),
    )
    batch = _write(tmp_path, [row])[0]
    assert batch.input_ids_BT.tolist() == [
        [11, 12, 13, 14, 0, 0],
        [21, 22, 0, 0, 0, 0],
        [31, 32, 33, 34, 35, 36],
    ]
    X = IGNORED
    assert batch.labels_BT.tolist() == [
        [X, 13, 14, X, X, X],
        [22, X, X, X, X, X],
        [32, X, 34, X, 36, X],  # nothing predicts the first token, although it is a target
    ]
    assert (batch.num_tokens, batch.num_targets) == (12, 6)


def test_batches_are_found_in_every_row_group(tmp_path: Path) -> None:
    rows = [_row(4, ([index, index + 1], [False, True])) for index in range(7)]
    batches = _write(tmp_path, rows, group=3)
    assert len(batches) == 7
    for index in (6, 0, 3, 2, 5, 1, 4, 0):
        assert batches[index].input_ids_BT[0, :2].tolist() == [index, index + 1]
    assert batches.summary == {"num_batches": 7}


@pytest.mark.parametrize("index", [-1, 3])
def test_a_batch_that_is_not_there_is_a_shape_error(index: int, tmp_path: Path) -> None:
    batches = _write(tmp_path, [_row(4, ([1, 2], [False, True]))] * 3)
    with pytest.raises(ShapeError, match=f"batch {index} is not in a BatchSet of 3"):
        batches[index]


@pytest.mark.parametrize("name", [BATCHES_NAME, SUMMARY_NAME])
@pytest.mark.parametrize("contents", [None, b"", b"{garbage"])
def test_a_damaged_batch_set_is_named(name: str, contents: bytes | None, tmp_path: Path) -> None:
    _write(tmp_path, [_row(4, ([1, 2], [False, True]))])
    (tmp_path / name).unlink()
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ArtifactError, match="no readable BatchSet"):
        BatchSet(tmp_path)


def _take(num_batches: int, seed: int, start: int, world: int, rank: int, count: int) -> Any:
    order = plan_order(num_batches, seed=seed, start=start, world_size=world, rank=rank)
    return list(itertools.islice(order, count))


@settings(max_examples=150, deadline=None)
@given(
    num_batches=st.integers(1, 20),
    start=st.integers(0, 60),
    world_size=st.integers(1, 6),
    rounds=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_the_ranks_share_out_one_sequence_whatever_their_number(
    num_batches: int, start: int, world_size: int, rounds: int, seed: int
) -> None:
    alone = dict(_take(num_batches, seed, 0, 1, 0, start + rounds * world_size))
    shared = [
        pair
        for rank in range(world_size)
        for pair in _take(num_batches, seed, start, world_size, rank, rounds)
    ]
    positions = sorted(position for position, _ in shared)
    assert positions == list(range(start, start + rounds * world_size))
    assert all(alone[position] == batch for position, batch in shared)


def test_every_epoch_is_another_permutation() -> None:
    sequence = [batch for _, batch in _take(9, 0, 0, 1, 0, 36)]
    epochs = [sequence[begin : begin + 9] for begin in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order() -> None:
    assert _take(30, 1, 0, 1, 0, 30) == _take(30, 1, 0, 1, 0, 30)
    assert _take(30, 1, 0, 1, 0, 30) != _take(30, 2, 0, 1, 0, 30)
