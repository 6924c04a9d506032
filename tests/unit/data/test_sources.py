import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1ray.data import sources
from r1ray.data.sources import ROW_SCHEMA, read_file, rows_to_table
from r1ray.errors import ArtifactError

GOOD = {"prompt": "What is 1 + 1?", "completion": "2"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
JSONL_SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]


def _read(path: Path) -> list[dict[str, Any]]:
    tables = list(read_file(str(path)))
    assert all(table.schema == ROW_SCHEMA for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def _write_lines(path: Path, lines: list[bytes]) -> Path:
    data = b"\n".join(lines) + b"\n"
    compress = {".gz": gzip.compress, ".zst": _zstd}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return path


def _zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def _line(**row: Any) -> bytes:
    return json.dumps(row).encode()


CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "row is list, not an object"),
    "no fields": ({"text": "x"}, "neither `messages` nor `prompt` and `completion`"),
    "empty turn": ({"messages": [{"role": "user", "content": " \n"}, TURNS[1]]}, "turn 0 is empty"),
    "lone surrogate": ({"prompt": "\ud800", "completion": "x"}, "lone surrogates"),
    "lone surrogate in tools": ({**GOOD, "tools": [{"\ud800": 1}]}, "lone surrogates"),
    "lone surrogate in arguments": ({"messages": [TURNS[0], CALL]}, "lone surrogates"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", JSONL_SUFFIXES)
def test_every_bad_row_comes_out_with_its_reason(suffix: str, tmp_path: Path) -> None:
    rows = [_line(**GOOD)]
    rows += [json.dumps(value).encode() for value, _ in BAD_ROWS.values()]
    found = _read(_write_lines(tmp_path / f"rows{suffix}", [*rows, _line(**GOOD)]))
    assert len(found) == len(BAD_ROWS) + 2
    assert [row["row"] for row in found] == list(range(len(found)))
    for row, (name, (_, reason)) in zip(found[1:-1], BAD_ROWS.items(), strict=True):
        assert reason in row["error"], name
        assert row["messages"] is None
        assert row["excerpt"]
    for row in (found[0], found[-1]):
        assert (row["error"], row["excerpt"]) == (None, None)
        assert json.loads(row["messages"])[1]["content"] == "2"
        assert row["source"].endswith(f"rows{suffix}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "\xff", "completion": "x"}', "not UTF-8 (invalid start byte at byte 12)"),
        (b"{prompt: 1}", "not JSON ("),
        (b'{"prompt": "x"', "not JSON ("),
        (b"", "not JSON ("),
        (b"   ", "not JSON ("),
        (b"[" * 100_000, "not JSON ("),
        (b"1" * 5000, "not JSON ("),
        (b'{"prompt": "\x00", "completion": "x"}', "not JSON ("),
    ],
)
def test_a_line_that_is_no_json_object_is_a_row_with_an_error(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    found = _read(_write_lines(tmp_path / "a.jsonl", [_line(**GOOD), line, _line(**GOOD)]))
    assert [row["error"] is None for row in found] == [True, False, True]
    assert found[1]["error"].startswith(reason)
    assert len(found[1]["excerpt"]) <= 200


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_the_last_line_counts_with_and_without_a_line_break(ending: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_line(**GOOD) + b"\r\n" + _line(**GOOD) + ending)
    found = _read(tmp_path / "a.jsonl")
    assert [row["error"] for row in found] == [None, None]


def test_a_byte_order_mark_does_not_cost_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + _line(**GOOD) + b"\n")
    assert [row["error"] for row in _read(tmp_path / "a.jsonl")] == [None]


@pytest.mark.parametrize("suffix", JSONL_SUFFIXES)
def test_a_row_that_is_too_long_is_skipped_as_a_whole(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 100)
    lines = [_line(**GOOD), b"x" * 1000, _line(**GOOD), b"y" * 100, b"z" * 101]
    found = _read(_write_lines(tmp_path / f"a{suffix}", lines))
    assert [row["row"] for row in found] == [0, 1, 2, 3, 4]
    errors = [row["error"] for row in found]
    assert (errors[0], errors[2]) == (None, None)
    assert errors[1] == errors[4] == "row is longer than 100 bytes"
    assert "row is longer" in errors[3] or "not JSON" in errors[3]


def test_rows_beyond_one_table_keep_their_order_and_number(tmp_path: Path) -> None:
    lines = [_line(prompt=str(number), completion="x") for number in range(700)]
    found = _read(_write_lines(tmp_path / "a.jsonl", lines))
    assert [json.loads(row["messages"])[0]["content"] for row in found] == [
        str(number) for number in range(700)
    ]
    assert [row["row"] for row in found] == list(range(700))


@pytest.mark.parametrize("suffix", JSONL_SUFFIXES)
def test_an_empty_file_has_no_rows(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"")
    assert _read(tmp_path / f"a{suffix}") == []


def test_all_frames_of_a_zstd_file_are_read(tmp_path: Path) -> None:
    line = _line(**GOOD) + b"\n"
    skippable = bytes.fromhex("502a4d18") + (5).to_bytes(4, "little") + b"hello"
    data = skippable + _zstd(line * 300) + _zstd(b"") + _zstd(line[:9]) + skippable
    (tmp_path / "a.jsonl.zst").write_bytes(data + _zstd(line[9:]))
    assert [row["error"] for row in _read(tmp_path / "a.jsonl.zst")] == [None] * 301


@pytest.mark.parametrize("num_left", [1, 4, 20, -1])
def test_a_zstd_file_cut_within_any_frame_is_named(num_left: int, tmp_path: Path) -> None:
    whole = _zstd(b"".join(_line(prompt=str(n**9), completion="x") + b"\n" for n in range(50)))
    for frames in (b"", whole):
        (tmp_path / "a.jsonl.zst").write_bytes(frames + whole[:num_left])
        with pytest.raises(ArtifactError, match=r"a\.jsonl\.zst: cannot be read \(Truncated"):
            _read(tmp_path / "a.jsonl.zst")


def test_tools_and_ignored_fields_come_along(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    turns = [{**TURNS[0], "weight": 0, "id": "x"}, TURNS[1]]
    lines = [_line(messages=turns, tools=tools), _line(**GOOD, tools=json.dumps(tools))]
    first, second = _read(_write_lines(tmp_path / "a.jsonl", lines))
    assert json.loads(first["messages"]) == TURNS
    assert json.loads(first["tools"]) == json.loads(second["tools"]) == tools
    assert (first["ignored"], second["ignored"]) == (["turn.id", "turn.weight"], None)


@pytest.mark.parametrize("suffix", [*JSONL_SUFFIXES, ".parquet"])
def test_a_row_of_ten_megabytes_is_quarantined_and_one_of_seven_is_kept(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    texts = ["short", "x" * (10 << 20), "y" * (7 << 20), "\u4e00" * (3 << 20), "short"]
    if suffix == ".parquet":
        _write_parquet(path, {"prompt": texts, "completion": ["z"] * len(texts)})
    else:
        lines = [json.dumps({"prompt": t, "completion": "z"}, ensure_ascii=False) for t in texts]
        _write_lines(path, [line.encode() for line in lines])
    found = _read(path)
    too_long = "row is longer than 8388608 bytes"
    assert [row["error"] for row in found] == [None, too_long, None, too_long, None]
    assert len(found[1]["excerpt"]) <= 200
    assert "xxx" in found[1]["excerpt"]


def test_tables_of_long_rows_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_TABLE_BYTES", 1000)
    lines = [_line(prompt="x" * 400, completion="y") for _ in range(9)]
    sizes = [table.num_rows for table in read_file(str(_write_lines(tmp_path / "a.jsonl", lines)))]
    assert sizes == [3, 3, 3]


def test_missing_fields_of_a_table_are_null() -> None:
    table = rows_to_table([{"source": "x", "row": 3, "messages": "[]"}])
    assert table.schema == ROW_SCHEMA
    assert table.to_pylist() == [
        dict.fromkeys(ROW_SCHEMA.names) | {"source": "x", "row": 3, "messages": "[]"}
    ]


def _write_parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    pq.write_table(pa.table(dict(columns)), path, row_group_size=2)
    return path


def test_parquet_rows_read_like_jsonl_rows(tmp_path: Path) -> None:
    path = _write_parquet(
        tmp_path / "a.parquet",
        {
            "messages": pa.array([TURNS, None, None, []]),
            "prompt": [None, "What?", "", "x"],
            "completion": [None, "That.", "x", "y"],
            "other": [1, 2, 3, 4],
        },
    )
    found = _read(path)
    assert json.loads(found[0]["messages"]) == TURNS
    assert json.loads(found[1]["messages"])[1] == {"role": "assistant", "content": "That."}
    assert found[2]["error"] == "turn 0 is empty"
    assert found[3]["error"] == "`messages` is not a non-empty list"
    assert [row["row"] for row in found] == [0, 1, 2, 3]


def test_parquet_text_that_is_no_utf8_is_a_row_with_an_error(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    path = _write_parquet(tmp_path / "a.parquet", {"prompt": broken, "completion": ["x", "y"]})
    found = _read(path)
    assert found[0]["error"] is None
    assert "not UTF-8" in found[1]["error"]


def test_parquet_rows_of_one_file_may_have_different_layouts(tmp_path: Path) -> None:
    calls = [{"function": {"name": "add", "arguments": '{"a": 1}'}, "id": None}]
    turns = [
        {"role": "user", "content": "Hi", "name": "Ann", "weight": 1.0, "tool_calls": None},
        {"role": "assistant", "content": None, "name": None, "weight": None, "tool_calls": calls},
    ]
    path = _write_parquet(
        tmp_path / "a.parquet",
        {
            "messages": pa.array([turns, None, None]),
            "problem": [None, "1 + 1?", "2 + 2?"],
            "generations": pa.array([None, ["3", "2"], ["5"]]),
            "correctness_math_verify": pa.array([None, [False, True], [False]]),
            "solution": [None, "no", "no"],
        },
    )
    found = _read(path)
    assert json.loads(found[0]["messages"]) == [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
        },
    ]
    assert found[0]["ignored"] == ["turn.weight"]
    assert json.loads(found[1]["messages"])[1]["content"] == "2"
    assert found[2]["error"] == "no generation is complete and correct"
    assert "2 + 2?" in found[2]["excerpt"]


def test_a_batch_of_long_parquet_rows_is_small_and_never_empty(tmp_path: Path) -> None:
    texts = ["x" * 40_000 + str(number) for number in range(8)]
    table = pa.table({"prompt": texts, "unused": texts, "completion": ["y"] * 8})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, use_dictionary=False)
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    wanted = ["prompt", "completion"]
    assert sources._plan_batch_rows(group, wanted) == sources._TABLE_ROWS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_TABLE_BYTES", 85_000)
        assert sources._plan_batch_rows(group, wanted) == 2
        patch.setattr(sources, "_TABLE_BYTES", 10)
        assert sources._plan_batch_rows(group, wanted) == 1
        found = _read(tmp_path / "a.parquet")
    assert [json.loads(row["messages"])[0]["content"] for row in found] == texts


def test_parquet_without_the_wanted_columns_reports_every_row(tmp_path: Path) -> None:
    found = _read(_write_parquet(tmp_path / "a.parquet", {"text": ["a", "b", "c"]}))
    assert [row["row"] for row in found] == [0, 1, 2]
    assert all("neither `messages`" in row["error"] for row in found)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "flipped"])
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        numbers = [f"{number} {number**5}" for number in range(300)]
        _write_parquet(path, {"prompt": numbers, "completion": numbers})
    else:
        _write_lines(path, [_line(prompt=str(n**7), completion=str(n)) for n in range(300)])
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data = bytearray(b"\x00\x01nothing of the kind" * 9)
    elif damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[40:80] = bytes(byte ^ 0xFF for byte in data[40:80])
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"a\.(parquet|jsonl\.(gz|zst)): cannot be read"):
        _read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent\.jsonl: cannot be read"):
        _read(tmp_path / "absent.jsonl")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=300))
def test_any_bytes_as_jsonl_give_rows_and_never_an_exception(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    found = _read(path)
    assert len(found) == data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    assert all((row["error"] is None) == (row["messages"] is not None) for row in found)


def test_parquet_values_without_a_python_form_are_quarantined_alone(tmp_path: Path) -> None:
    dates = pa.array([0, 2**31 - 1], pa.int32()).view(pa.date32())
    table = pa.table({"prompt": dates, "completion": ["a", "b"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = pa.concat_tables(read_file(str(tmp_path / "rows.parquet"))).to_pylist()
    assert len(rows) == 2
    assert "type date" in rows[0]["error"]
    assert rows[1]["error"].startswith("cannot be read (OverflowError")


def test_a_parquet_column_that_occurs_twice_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["prompt", "prompt", "completion"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ArtifactError, match=r"rows\.parquet.*'prompt' occurs 2 times"):
        list(read_file(str(tmp_path / "rows.parquet")))
