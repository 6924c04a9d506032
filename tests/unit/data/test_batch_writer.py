import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.config.prepare import (
    BucketsConfig,
    FileSourceConfig,
    PackingConfig,
    PrepareConfig,
)
from r1ray.data import batch_writer
from r1ray.data.batch_set import BATCHES_NAME, IGNORED, SUMMARY_NAME, BatchSet, MicroBatch
from r1ray.data.batch_writer import BatchWriter
from r1ray.data.planners import BatchPlanner, FixedBuckets, LearnedBuckets, PackingPlanner
from r1ray.data.tokenize_table import SAMPLE_SCHEMA
from r1ray.errors import ArtifactError

Kind = Literal["fixed", "learned", "packing"]
MAX_TOKENS, BATCH_TOKENS = 120, 500
_Sample = tuple[tuple[int, ...], tuple[bool, ...]]


def _samples(num_samples: int, seed: int = 0) -> list[_Sample]:
    """Samples of random lengths, all different, with a target each; the first token is none."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(num_samples):
        length = int(np.clip(rng.lognormal(3.0, 0.8), 3, MAX_TOKENS))
        input_ids = rng.integers(1, 1000, length)
        input_ids[0] = 1000 + number
        is_target = rng.random(length) < 0.5
        is_target[0], is_target[-1] = False, True
        found.append((tuple(input_ids.tolist()), tuple(is_target.tolist())))
    return found


def _tables(samples: Sequence[_Sample], sizes: Sequence[int]) -> Iterator[pa.Table]:
    start = 0
    for size in sizes:
        part = samples[start : start + size]
        columns = [pa.array(list(values)) for values in zip(*part, strict=True)]
        yield pa.Table.from_arrays(columns, names=SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
        start += size
    assert start == len(samples)


def _writer(directory: Path, kind: Kind, pad_to: Any = "longest") -> BatchWriter:
    batching: BucketsConfig | PackingConfig = PackingConfig(type="packing")
    if kind != "packing":
        batching = BucketsConfig(
            type="buckets",
            pad_to=pad_to,
            num_buckets=4,
            fit_rows=50 if kind == "learned" else None,
        )
    config = PrepareConfig(
        sources=[FileSourceConfig(type="files", paths=["rows.jsonl"])],
        max_tokens=MAX_TOKENS,
        batch_tokens=BATCH_TOKENS,
        batching=batching,
    )
    planner: BatchPlanner
    if isinstance(batching, PackingConfig):
        planner = PackingPlanner(config)
    elif kind == "learned":
        planner = LearnedBuckets(config, batching)
    else:
        planner = FixedBuckets(config, [10, 20, 50, MAX_TOKENS])
    return BatchWriter(directory, planner, config)


def _write(
    directory: Path, kind: Kind, tables: Iterator[pa.Table], pad_to: Any = "longest"
) -> BatchSet:
    with _writer(directory, kind, pad_to) as writer:
        for table in tables:
            writer.add(table)
    (directory / SUMMARY_NAME).write_text(json.dumps(writer.summarize()))
    return BatchSet(directory)


def _read_samples(batch: MicroBatch) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, labels) of each sample, padding stripped; no token of a sample is 0."""
    input_ids, labels = batch.input_ids_BT, batch.labels_BT
    if batch.document_lengths is not None:
        pieces = zip(
            input_ids[0].split(batch.document_lengths),
            labels[0].split(batch.document_lengths),
            strict=True,
        )
    else:
        pieces = zip(input_ids, labels, strict=True)
    for tokens, following in pieces:
        real = tokens != 0
        if real.any():
            yield tokens[real].tolist(), following[real].tolist()
        assert (following[~real] == IGNORED).all()


def _expected_labels(sample: _Sample) -> list[int]:
    input_ids, is_target = sample
    shifted = zip(input_ids[1:], is_target[1:], strict=True)
    return [token if flag else IGNORED for token, flag in shifted] + [IGNORED]


@pytest.fixture(params=["samples", "tokens"])
def small_windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of about 60 samples, whichever of the two bounds comes first; tiny row groups."""
    monkeypatch.setattr(batch_writer, "_GROUP_TOKENS", 4 * BATCH_TOKENS)
    if request.param == "samples":
        monkeypatch.setattr(batch_writer, "WINDOW_SAMPLES", 60)
    else:
        monkeypatch.setattr(batch_writer, "WINDOW_TOKENS", 1500)


SIZES = [1, 40, 3, 100, 7, 7, 130, 12]


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["fixed", "learned", "packing"])
def test_every_sample_is_read_back_once_with_its_targets(kind: Kind, tmp_path: Path) -> None:
    samples = _samples(sum(SIZES))
    batches = _write(tmp_path, kind, _tables(samples, SIZES))
    expected = {sample[0]: _expected_labels(sample) for sample in samples}
    found = [
        (tuple(tokens), labels)
        for index in range(len(batches))
        for tokens, labels in _read_samples(batches[index])
    ]
    assert len(found) == len(samples)
    assert dict(found) == expected
    assert pq.ParquetFile(tmp_path / BATCHES_NAME).num_row_groups >= 5


def _ceiling(batch: MicroBatch, fits: list[dict[str, Any]]) -> int:
    """The bucket that the batch is from; a packed batch is its own."""
    columns = batch.input_ids_BT.shape[1]
    return min(top for top in fits[0]["ceilings"] if top >= columns) if fits else columns


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("pad_to", ["longest", "ceiling"])
def test_a_bucketed_batch_is_as_wide_as_configured(pad_to: str, tmp_path: Path) -> None:
    samples = _samples(sum(SIZES), seed=2)
    batches = _write(tmp_path, "fixed", _tables(samples, SIZES), pad_to=pad_to)
    widths = set()
    for index in range(len(batches)):
        batch = batches[index]
        longest = int(batch.input_ids_BT.ne(0).sum(dim=1).max())
        assert longest <= batch.input_ids_BT.shape[1] <= _ceiling(batch, batches.summary["fits"])
        widths.add(batch.input_ids_BT.shape[1] - longest)
    assert widths == {0} if pad_to == "longest" else widths > {0}
    if pad_to == "ceiling":
        ceilings = set(batches.summary["fits"][0]["ceilings"])
        assert {batches[i].input_ids_BT.shape[1] for i in range(len(batches))} <= ceilings


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["fixed", "learned", "packing"])
def test_the_summary_is_what_a_recount_of_the_batches_gives(kind: Kind, tmp_path: Path) -> None:
    samples = _samples(sum(SIZES), seed=1)
    batches = _write(tmp_path, kind, _tables(samples, SIZES))
    read = [batches[index] for index in range(len(batches))]
    computed = sum(batch.input_ids_BT.numel() for batch in read)
    num_tokens = sum(len(input_ids) for input_ids, _ in samples)
    assert sum(batch.num_tokens for batch in read) == num_tokens
    fits = batches.summary.pop("fits")
    assert batches.summary == {
        "num_batches": len(read),
        "num_tokens": num_tokens,
        "num_targets": sum(batch.num_targets for batch in read),
        "padding_share": 1 - num_tokens / computed,
        "max_batch_tokens": max(batch.input_ids_BT.numel() for batch in read),
        "batches_per_ceiling": {
            str(top): count
            for top, count in sorted(Counter(_ceiling(batch, fits) for batch in read).items())
        },
    }
    assert batches.summary["max_batch_tokens"] <= BATCH_TOKENS
    assert [fit["first_sample"] for fit in fits] == ([] if kind == "packing" else [0])
    assert [fit["ceilings"][-1] for fit in fits] == [MAX_TOKENS] * len(fits)


@pytest.mark.parametrize("kind", ["fixed", "learned", "packing"])
def test_windows_change_which_rows_meet_but_neither_rows_nor_tokens(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = _samples(200)
    summaries: list[dict[str, Any]] = []
    for window in (10, 70, 1000):
        monkeypatch.setattr(batch_writer, "WINDOW_SAMPLES", window)
        directory = tmp_path / str(window)
        directory.mkdir()
        summaries.append(_write(directory, kind, _tables(samples, [5] * 40)).summary)
    for name in ("num_tokens", "num_targets"):
        assert len({summary[name] for summary in summaries}) == 1
    if kind == "fixed":  # full batches of a bucket are as many, wherever the window ends
        assert len({summary["num_batches"] for summary in summaries}) == 1


def test_packing_leaves_next_to_no_padding_where_buckets_leave_some(tmp_path: Path) -> None:
    samples = _samples(400)
    shares: dict[str, float] = {}
    kinds: tuple[Kind, Kind] = ("fixed", "packing")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        summary = _write(tmp_path / kind, kind, _tables(samples, [400])).summary
        shares[kind] = summary["padding_share"]
    # Full rows of 500 tokens lack nothing; the last one lacks less than a row of some twenty.
    assert shares["packing"] < 0.02 < shares["fixed"]


def _broken(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Some of `tables`, and then what a `SampleCollector` may raise."""
    yield from itertools.islice(tables, 6)
    raise ArtifactError("too many rows quarantined")


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("kind", ["fixed", "learned", "packing"])
def test_an_exception_leaves_nothing_that_counts_as_a_batch_set(kind: Kind, tmp_path: Path) -> None:
    tables = _tables(_samples(sum(SIZES)), SIZES)
    with pytest.raises(ArtifactError, match="too many rows quarantined"):
        _write(tmp_path, kind, _broken(tables))
    assert [path.name for path in tmp_path.iterdir()] == [BATCHES_NAME]
    with pytest.raises(ArtifactError, match="no readable BatchSet"):
        BatchSet(tmp_path)


def test_no_samples_make_an_empty_file_and_a_summary_without_padding(tmp_path: Path) -> None:
    batches = _write(tmp_path, "fixed", iter([SAMPLE_SCHEMA.empty_table()]))
    assert len(batches) == 0
    assert batches.summary["num_tokens"] == batches.summary["padding_share"] == 0


@pytest.mark.parametrize("kind", ["fixed", "packing"])
def test_a_target_that_nothing_predicts_is_not_counted(kind: Kind, tmp_path: Path) -> None:
    samples: list[_Sample] = [((5, 6, 7), (True, True, False)), ((8, 9), (True, True))]
    batches = _write(tmp_path, kind, _tables(samples, [2]))
    read = sum(batches[index].num_targets for index in range(len(batches)))
    assert batches.summary["num_targets"] == read == 2


def test_ceilings_are_learned_from_the_first_rows_whatever_the_writers_window(
    tmp_path: Path,
) -> None:
    samples = sorted(_samples(sum(SIZES)), key=lambda sample: len(sample[0]))
    with _writer(tmp_path, "learned") as writer:
        for table in _tables(samples, SIZES):
            writer.add(table)
    seen = next(count for count in itertools.accumulate(SIZES) if count >= 50)  # fit_rows
    first, last = writer.summarize()["fits"][0]["ceilings"][-2:]
    assert (first, last) == (len(samples[seen - 1][0]), MAX_TOKENS)
