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
from r1ray.data.sources import ROW_SCHEMA, RowError, list_files, normalize_row, read_file
from r1ray.errors import ArtifactError, ConfigError

GOOD = {"prompt": "What is 1 + 1?", "completion": "2"}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def _read(path: Path) -> list[dict[str, Any]]:
    tables = list(read_file(str(path)))
    assert all(table.schema == ROW_SCHEMA for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def _write_lines(path: Path, lines: list[bytes]) -> Path:
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _line(**row: Any) -> bytes:
    return json.dumps(row).encode()


def test_prompt_and_completion_become_two_turns() -> None:
    assert normalize_row(GOOD) == [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    assert normalize_row({"prompt": TURNS[:1], "completion": "Hello"}) == TURNS


def test_messages_are_taken_as_they_are_without_further_fields() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, {**TURNS[0], "name": "x"}, TURNS[1]], "id": 7}
    assert normalize_row(row) == [system, *TURNS]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "row is list, not an object"),
    "null": (None, "row is NoneType, not an object"),
    "no fields": ({"text": "x"}, "neither `messages` nor `prompt` and `completion`"),
    "no completion": ({"prompt": "x"}, "neither `messages`"),
    "null completion": ({"prompt": "x", "completion": None}, "neither `messages`"),
    "no turns": ({"messages": []}, "not a non-empty list"),
    "messages is text": ({"messages": "hi"}, "not a non-empty list"),
    "turn is text": ({"messages": ["hi"]}, "turn 0 is str, not an object"),
    "wrong role": ({"messages": [{"role": "bot", "content": "x"}]}, "turn 0 has role 'bot'"),
    "role is a list": ({"messages": [{"role": [], "content": "x"}]}, "turn 0 has role []"),
    "no role": ({"messages": [{"content": "x"}]}, "turn 0 has role None"),
    "empty turn": ({"messages": [{"role": "user", "content": " \n"}, TURNS[1]]}, "turn 0 is empty"),
    "empty prompt": ({"prompt": "", "completion": "x"}, "turn 0 is empty"),
    "content is a number": ({"prompt": 3, "completion": "x"}, "content of type int, not a string"),
    "content is missing": ({"messages": [{"role": "user"}]}, "content of type NoneType"),
    "ends in a user turn": ({"messages": TURNS[:1]}, "last turn is 'user', not 'assistant'"),
    "lone surrogate": ({"prompt": "\ud800", "completion": "x"}, "lone surrogates"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
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


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
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


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert _read(tmp_path / "a.jsonl") == []


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


def test_parquet_without_the_wanted_columns_reports_every_row(tmp_path: Path) -> None:
    found = _read(_write_parquet(tmp_path / "a.parquet", {"text": ["a", "b", "c"]}))
    assert [row["row"] for row in found] == [0, 1, 2]
    assert all("neither `messages`" in row["error"] for row in found)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
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
    with pytest.raises(ArtifactError, match=r"a\.(parquet|jsonl\.gz): cannot be read"):
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


_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "completion"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=_VALUES)
def test_any_json_value_is_a_conversation_or_a_row_error(value: Any) -> None:
    try:
        messages = normalize_row(value)
    except RowError:
        return
    assert messages[-1]["role"] == "assistant"
    assert all(turn["content"].strip() for turn in messages)


def test_files_directories_and_globs_are_listed_once_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.parquet", "deep/c.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    everything = [str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "deep/c.jsonl.gz")]
    assert list_files([str(tmp_path)]) == everything
    assert list_files([str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl")]) == everything[1:2]
    assert list_files([f"{tmp_path}/**/*.gz"]) == everything[2:]
    assert list_files([str(tmp_path / "deep"), str(tmp_path)]) == everything


def test_uris_are_listed_like_paths(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "deep/c.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_bytes(_line(**GOOD) + b"\n" if name == "b.jsonl" else b"")
    root = f"file://{tmp_path}"
    assert list_files([root]) == [f"{root}/b.jsonl", f"{root}/deep/c.jsonl.gz"]
    assert list_files([f"{root}/*.jsonl"]) == [f"{root}/b.jsonl"]
    [table] = read_file(f"{root}/b.jsonl")
    assert table.num_rows == 1
    with pytest.raises(ConfigError, match="matches no"):
        list_files([f"{root}/*.csv"])


def test_paths_that_match_nothing_or_are_of_no_known_kind_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"absent\.jsonl' matches no \.jsonl"):
        list_files([str(tmp_path / "absent.jsonl")])
    with pytest.raises(ConfigError, match="matches no"):
        list_files([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"notes\.txt is not one of"):
        list_files([str(tmp_path / "notes.txt")])


def test_a_file_named_in_two_ways_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "sub" / "more.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    found = list_files([".", "rows.jsonl", "sub/../rows.jsonl", "*"])
    assert found == [str(tmp_path / "rows.jsonl"), str(tmp_path / "sub" / "more.jsonl")]


@pytest.mark.parametrize("path", ["foo://x", "file://x", "x" * 5000])
def test_paths_that_cannot_be_listed_are_config_errors(path: str) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.sources"):
        list_files([path])


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
