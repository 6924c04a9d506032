import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
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


def _row(
    ceiling: int, *samples: tuple[list[int], list[bool]], is_packed: bool = False
) -> dict[str, Any]:
    return {
        "num_columns": ceiling,
        "is_packed": is_packed,
        "lengths": [len(ids) for ids, _ in samples],
        "input_ids": [token for ids, _ in samples for token in ids],
        "is_target": [flag for _, flags in samples for flag in flags],
    }


def _write(directory: Path, rows: list[dict[str, Any]], group: int = 2) -> BatchSet:
    table = pa.Table.from_pylist(rows, schema=BATCH_SCHEMA)
    pq.write_table(table, directory / BATCHES_NAME, row_group_size=group)
    sizes = [row["num_columns"] * (1 if row["is_packed"] else len(row["lengths"])) for row in rows]
    summary = {"num_batches": len(rows), "max_batch_tokens": max(sizes)}
    (directory / SUMMARY_NAME).write_text(json.dumps(summary))
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
    assert batch.document_lengths is None


def test_a_packed_batch_is_one_row_and_its_labels_stay_within_their_document(
    tmp_path: Path,
) -> None:
    samples = (
        ([11, 12, 13, 14], [False, False, True, True]),
        ([21], [True]),
        ([31, 32, 33], [True, True, False]),
    )
    padded, full = _row(11, *samples, is_packed=True), _row(8, *samples, is_packed=True)
    batches = _write(tmp_path, [padded, full])
    X = IGNORED
    labels = [X, 13, 14, X, X, 32, X, X]  # nothing predicts 21 or 31, the first of their documents
    tokens = [11, 12, 13, 14, 21, 31, 32, 33]
    for batch, padding in ((batches[0], 3), (batches[1], 0)):
        assert batch.input_ids_BT.tolist() == [tokens + [0] * padding]
        assert batch.labels_BT.tolist() == [labels + [X] * padding]
        assert (batch.num_tokens, batch.num_targets) == (8, 3)
    assert batches[0].document_lengths == (4, 1, 3, 3)  # the padding is one more
    assert batches[1].document_lengths == (4, 1, 3)


def _random_row(rng: random.Random) -> dict[str, Any]:
    samples = []
    for _ in range(rng.randint(1, 5)):
        length = rng.randint(1, 12)
        input_ids = [rng.randint(1, 99) for _ in range(length)]
        samples.append((input_ids, [rng.random() < 0.5 for _ in range(length)]))
    lengths = [len(input_ids) for input_ids, _ in samples]
    is_packed = rng.random() < 0.5
    least = sum(lengths) if is_packed else max(lengths)
    return _row(least + rng.randint(0, 5), *samples, is_packed=is_packed)


@pytest.mark.parametrize("seed", range(3))
def test_reading_into_buffers_gives_the_same_batch_in_the_same_memory(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    batches = _write(tmp_path, [_random_row(rng) for _ in range(40)], group=7)
    buffers = batches.build_buffers()
    order = [*range(40), *range(40)]
    rng.shuffle(order)
    places = set()
    for index in order:
        alone, reused = batches.read(index), batches.read(index, buffers)
        assert torch.equal(alone.input_ids_BT, reused.input_ids_BT)
        assert torch.equal(alone.labels_BT, reused.labels_BT)
        assert alone.input_ids_BT.data_ptr() != reused.input_ids_BT.data_ptr()
        for name in ("num_tokens", "num_targets", "document_lengths"):
            assert getattr(alone, name) == getattr(reused, name)
        places.add((reused.input_ids_BT.data_ptr(), reused.labels_BT.data_ptr()))
    assert len(places) == 1


def test_a_batch_read_without_buffers_outlives_the_next_one(tmp_path: Path) -> None:
    rows = [_row(4, ([index, index + 1], [False, True])) for index in (5, 50)]
    batches = _write(tmp_path, rows)
    first = batches[0]
    batches[1].input_ids_BT.zero_()
    batches.read(1, batches.build_buffers())
    assert first.input_ids_BT.tolist() == [[5, 6, 0, 0]]


def test_batches_are_found_in_every_row_group(tmp_path: Path) -> None:
    rows = [_row(4, ([index, index + 1], [False, True])) for index in range(7)]
    batches = _write(tmp_path, rows, group=3)
    assert len(batches) == 7
    for index in (6, 0, 3, 2, 5, 1, 4, 0):
        assert batches[index].input_ids_BT[0, :2].tolist() == [index, index + 1]
    assert batches.summary["num_batches"] == 7


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


@settings(max_examples=150, deadline=None)
@given(
    num_batches=st.integers(1, 12),
    runs=st.lists(st.tuples(st.integers(1, 16), st.integers(0, 6)), min_size=1, max_size=6),
    seed=st.integers(0, 3),
)
def test_resuming_with_any_number_of_ranks_neither_repeats_nor_loses_a_batch(
    num_batches: int, runs: list[tuple[int, int]], seed: int
) -> None:
    """Each run takes up where the last one stopped, with a world size of its own."""
    cursor = 0
    taken: list[tuple[int, int]] = []
    for world_size, rounds in runs:
        per_rank = [
            _take(num_batches, seed, cursor, world_size, rank, rounds) for rank in range(world_size)
        ]
        assert {len(pairs) for pairs in per_rank} == {rounds}
        taken += [pair for step in zip(*per_rank, strict=True) for pair in step]
        cursor += world_size * rounds
    assert [position for position, _ in taken] == list(range(cursor))
    for start in range(0, cursor, num_batches):
        epoch = [batch for _, batch in taken[start : start + num_batches]]
        if len(epoch) == num_batches:
            assert sorted(epoch) == list(range(num_batches))
        else:
            assert max(Counter(epoch).values()) == 1


def test_every_epoch_is_another_permutation() -> None:
    sequence = [batch for _, batch in _take(9, 0, 0, 1, 0, 36)]
    epochs = [sequence[begin : begin + 9] for begin in range(0, 36, 9)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order() -> None:
    assert _take(30, 1, 0, 1, 0, 30) == _take(30, 1, 0, 1, 0, 30)
    assert _take(30, 1, 0, 1, 0, 30) != _take(30, 2, 0, 1, 0, 30)


def test_a_batch_set_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    _write(tmp_path, [_row(4, ([1, 2], [False, True]))])
    summary = tmp_path / SUMMARY_NAME
    summary.write_text(json.dumps({"num_batches": 1}))
    with pytest.raises(ArtifactError, match=r"another version of r1ray; remove it and prepare"):
        BatchSet(tmp_path)
