import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from r1ray.config.prepare import (
    BucketsConfig,
    FileSourceConfig,
    PackingConfig,
    PrepareConfig,
)
from r1ray.data.collector import QUARANTINE_NAME, SampleCollector
from r1ray.data.length_sketch import LengthSketch
from r1ray.data.sources import rows_to_table
from r1ray.data.tokenize import Overflow
from r1ray.data.tokenize_table import RESULT_SCHEMA, SAMPLE_SCHEMA, tokenize_table
from r1ray.errors import ArtifactError
from tests.fakes import write_tiny_model

EXACT = BucketsConfig(type="buckets")


def _good(length: int, **columns: Any) -> dict[str, Any]:
    sample = {"input_ids": [7] * length, "is_target": [False] + [True] * (length - 1)}
    counts = {"piece": 0, "was_over_long": False, "num_dropped_pieces": 0}
    return {**sample, **counts, **columns}


def _bad(row: int, error: str = "not JSON", **columns: Any) -> dict[str, Any]:
    place = {"source": "a.jsonl", "row": row, "error": error, "excerpt": "{ä"}
    return {"piece": 0, "was_over_long": False, **place, **columns}


def _collector(
    out_dir: Path,
    tables: Sequence[Sequence[dict[str, Any]]],
    *,
    batching: BucketsConfig | PackingConfig = EXACT,
    max_quarantined_share: float = 1.0,
    seen: list[int] | None = None,
) -> SampleCollector:
    config = PrepareConfig(
        sources=[FileSourceConfig(type="files", paths=["rows.jsonl"])],
        max_tokens=5000,
        batch_tokens=5000,
        batching=batching,
        max_quarantined_share=max_quarantined_share,
    )
    results = [pa.Table.from_pylist(list(rows), schema=RESULT_SCHEMA) for rows in tables]
    on_rows = (lambda _: None) if seen is None else seen.append
    return SampleCollector(results, out_dir, config, on_rows)


def _lengths(collector: SampleCollector) -> list[int]:
    found: list[int] = []
    for table in collector:
        assert table.schema == SAMPLE_SCHEMA
        assert table.num_rows
        found += [len(input_ids) for input_ids in table["input_ids"].to_pylist()]
    return found


def test_samples_go_on_and_bad_rows_are_filed_with_place_and_reason(tmp_path: Path) -> None:
    seen: list[int] = []
    tables = [
        [_good(3), _bad(1, "not JSON"), _good(5)],
        [],
        [_bad(2, "last turn is 'user', not 'assistant'")],
        [_good(2)],
    ]
    collector = _collector(tmp_path, tables, seen=seen)
    assert _lengths(collector) == [3, 5, 2]
    assert collector.answers.counts == {1: 1, 2: 1, 4: 1}  # targets
    lines = (tmp_path / QUARANTINE_NAME).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"source": "a.jsonl", "row": 1, "error": "not JSON", "excerpt": "{ä"},
        {
            "source": "a.jsonl",
            "row": 2,
            "error": "last turn is 'user', not 'assistant'",
            "excerpt": "{ä",
        },
    ]
    assert "ä" in lines[0]
    assert seen == [3, 4, 5]
    assert dict(collector.counts) == {
        "num_rows": 5,
        "num_samples": 3,
        "num_quarantined": 2,
        "num_over_long": 0,
        "num_dropped_pieces": 0,
    }


def test_pieces_of_a_row_are_samples_but_one_row_even_in_two_tables(tmp_path: Path) -> None:
    row = [
        _good(9, was_over_long=True, num_dropped_pieces=2, ignored=["turn.weight"]),
        _good(9, piece=1),
        _good(4, piece=2),
    ]
    collector = _collector(tmp_path, [[_good(3), *row[:2]], row[2:]])
    assert _lengths(collector) == [3, 9, 9, 4]
    assert dict(collector.counts) == {
        "num_rows": 2,
        "num_samples": 4,
        "num_quarantined": 0,
        "num_over_long": 1,
        "num_dropped_pieces": 2,
    }
    assert collector.ignored == {"turn.weight": 1}


def test_ignored_fields_are_counted_by_rows(tmp_path: Path) -> None:
    rows = [
        _good(3, ignored=["turn.id", "turn.weight"]),
        _good(3),
        _good(3, ignored=["turn.id"]),
        _bad(3),
    ]
    collector = _collector(tmp_path, [rows, [_good(3, ignored=["turn.id"])]])
    _lengths(collector)
    assert collector.ignored == {"turn.id": 3, "turn.weight": 1}


@pytest.mark.parametrize(
    ("overflow", "num_quarantined", "num_samples"),
    [("reject", 2, 3), ("truncate", 0, 5), ("split", 0, 9)],
)
def test_over_long_rows_are_counted_by_rows_for_every_overflow(
    overflow: Overflow, num_quarantined: int, num_samples: int, tmp_path: Path
) -> None:
    answers = ["short", "0123456789 " * 12, "short", "9876543210 " * 12, "short"]
    question = {"role": "user", "content": "hi"}
    table = rows_to_table(
        [
            {"messages": json.dumps([question, {"role": "assistant", "content": answer}])}
            for answer in answers
        ]
    )
    result = tokenize_table(
        table,
        tokenizer_dir=str(write_tiny_model(tmp_path)),
        max_tokens=60,
        overflow=overflow,
        heldout_questions=frozenset(),
    )
    collector = _collector(tmp_path, [result.to_pylist()])
    assert len(_lengths(collector)) == num_samples
    assert collector.counts["num_rows"] == 5
    assert collector.counts["num_over_long"] == 2
    assert collector.counts["num_quarantined"] == num_quarantined


@pytest.mark.parametrize(
    ("batching", "bits"),
    [
        (EXACT, None),
        (BucketsConfig(type="buckets", fit_rows=100), 8),
        (PackingConfig(type="packing"), 8),
    ],
)
def test_the_sketch_is_exact_where_ceilings_are_fitted_to_all_rows(
    batching: BucketsConfig | PackingConfig, bits: int | None, tmp_path: Path
) -> None:
    lengths = np.random.default_rng(0).integers(2, 3000, 60).tolist()
    tables = [[_good(length) for length in lengths[start : start + 20]] for start in (0, 20, 40)]
    collector = _collector(tmp_path, [*tables, [_bad(60)]], batching=batching)
    _lengths(collector)
    expected = LengthSketch(bits)
    expected.add(lengths)
    assert collector.sketch.counts == expected.counts


@pytest.mark.parametrize("tables", [[], [[]], [[_bad(0), _bad(1)]]])
def test_no_usable_row_is_an_artifact_error(tables: list[Any], tmp_path: Path) -> None:
    num_rows = sum(map(len, tables))
    match = rf"none of {num_rows} rows is usable; reasons are in .*quarantine\.jsonl"
    with pytest.raises(ArtifactError, match=match):
        _lengths(_collector(tmp_path, tables))


def test_too_many_bad_rows_are_an_artifact_error_and_are_all_filed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = [[_good(3)] * 3, [_bad(3)], [_good(3)] * 5 + [_bad(9)]]
    with caplog.at_level(logging.WARNING, logger="r1ray.data.collector"):
        assert len(_lengths(_collector(tmp_path, tables, max_quarantined_share=0.2))) == 8
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "2 of 10 rows quarantined"
    ]
    with pytest.raises(
        ArtifactError,
        match=r"2 of 10 rows quarantined, above prepare.max_quarantined_share \(0.19\)",
    ):
        _lengths(_collector(tmp_path, tables, max_quarantined_share=0.19))
    assert len((tmp_path / QUARANTINE_NAME).read_text().splitlines()) == 2


def test_pieces_do_not_dilute_the_share_of_quarantined_rows(tmp_path: Path) -> None:
    pieces = [_good(3, piece=piece) for piece in range(98)]
    with pytest.raises(ArtifactError, match="1 of 2 rows quarantined"):
        _lengths(_collector(tmp_path, [[*pieces, _bad(1)]], max_quarantined_share=0.4))


def test_names_of_ignored_fields_are_bounded(tmp_path: Path) -> None:
    rows = [_good(3, ignored=[f"turn.{number}"]) for number in range(130)]
    collector = _collector(tmp_path, [rows])
    list(collector)
    assert len(collector.ignored) == 101
    assert collector.ignored["others"] == 30
