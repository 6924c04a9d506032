"""Rows of text from JSONL and Parquet files, each either usable or with the reason why not.

Rows hold `messages` (a list of {role, content}), or `prompt` and `completion`. A malformed row
never stops the reading and is never dropped: it comes out with an `error` and goes to quarantine.

Price: one pass over each file, in tables of a few hundred rows.
"""

import codecs
import fnmatch
import glob
import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from r1ray.errors import ArtifactError, ConfigError

__all__ = ["ROW_SCHEMA", "RowError", "list_files", "normalize_row", "read_file", "rows_to_table"]

ROW_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # file, or family for generated rows
        ("row", pa.int64()),  # line or row number in it, from 0
        ("messages", pa.string()),  # JSON list of {role, content}; null where error is set
        ("error", pa.string()),
        ("excerpt", pa.string()),  # the beginning of a bad row
    ]
)
logger = logging.getLogger(__name__)

MAX_ROW_BYTES = 8 << 20
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_ROLES = ("system", "user", "assistant", "tool")
_TABLE_ROWS = 256
_EXCERPT_CHARS = 200


class RowError(ValueError):
    """A row cannot be used; the message is its reason in the quarantine file."""


@dataclass(frozen=True)
class _Row:
    source: str
    row: int
    messages: str | None
    error: str | None
    excerpt: str | None


def list_files(paths: Sequence[str]) -> list[str]:
    """The data files behind `paths` (files, directories, globs, URIs), sorted, each once.

    Files of other kinds in a directory are left out, and their number is logged.

    Raises:
        ConfigError: a path matches nothing, cannot be listed, or is a file of no supported kind.
    """
    found: set[str] = set()
    for path in paths:
        try:
            matches = _list_uri(path) if "://" in path else _list_local(path)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"prepare.sources: {path!r} cannot be listed ({error})") from error
        if not matches:
            raise ConfigError(f"prepare.sources: {path!r} matches no {', '.join(_SUFFIXES)} file")
        found.update(matches)
    return sorted(found)


def _list_local(path: str) -> list[str]:
    entries = [Path(path)] if os.path.exists(path) else map(Path, glob.glob(path, recursive=True))
    found: list[str] = []
    for entry in entries:
        if entry.is_dir():
            files = [file for file in entry.rglob("*") if file.is_file()]
            usable = [file for file in files if file.name.endswith(_SUFFIXES)]
            if len(usable) < len(files):
                skipped = len(files) - len(usable)
                logger.warning("%s: %d files of other kinds are left out", entry, skipped)
            found += [str(file.resolve()) for file in usable]
        elif entry.name.endswith(_SUFFIXES):
            found.append(str(entry.resolve()))
        else:
            raise ConfigError(f"prepare.sources: {entry} is not one of {', '.join(_SUFFIXES)}")
    return found


def _list_uri(uri: str) -> list[str]:
    filesystem, path = fs.FileSystem.from_uri(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        if not path.endswith(_SUFFIXES):
            raise ConfigError(f"prepare.sources: {uri!r} is not one of {', '.join(_SUFFIXES)}")
        return [uri]
    if path not in uri:
        raise ConfigError(f"prepare.sources: {uri!r} is escaped; name its files one by one")
    root = path if info.type == fs.FileType.Directory else path.split("*", 1)[0].rpartition("/")[0]
    pattern = "*" if info.type == fs.FileType.Directory else path
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    return [
        uri.replace(path, entry.path, 1)  # keeps scheme, host and query
        for entry in filesystem.get_file_info(selector)
        if entry.type == fs.FileType.File
        and entry.path.endswith(_SUFFIXES)
        and fnmatch.fnmatch(entry.path, pattern)
    ]


def read_file(path: str) -> Iterator[pa.Table]:
    """Tables of `ROW_SCHEMA` with every row of the file `path`, in order.

    Raises:
        ArtifactError: the file as a whole cannot be read (missing, truncated, not Parquet).
    """
    try:
        filesystem, inner = (
            fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
        )
        with filesystem.open_input_file(inner) as stream:
            rows = _read_parquet(stream) if path.endswith(".parquet") else _read_jsonl(path, stream)
            batch: list[_Row] = []
            for number, (value, error, excerpt) in enumerate(rows):
                batch.append(_check_row(path, number, value, error, excerpt))
                if len(batch) == _TABLE_ROWS:
                    yield rows_to_table(batch)
                    batch = []
            if batch:
                yield rows_to_table(batch)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def rows_to_table(rows: Sequence[Any]) -> pa.Table:
    """A table of `ROW_SCHEMA` from objects or mappings with its fields."""
    values = [row if isinstance(row, dict) else vars(row) for row in rows]
    return pa.Table.from_pylist(values, schema=ROW_SCHEMA)


def normalize_row(value: Any) -> list[dict[str, str]]:
    """The messages of one row.

    Raises:
        RowError: it has none, or they are no conversation that ends in an assistant turn.
    """
    if not isinstance(value, dict):
        raise RowError(f"row is {type(value).__name__}, not an object")
    messages = value.get("messages")
    if messages is None:
        if value.get("prompt") is None or value.get("completion") is None:
            raise RowError("neither `messages` nor `prompt` and `completion`")
        prompt = value["prompt"]
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        messages = [*turns, {"role": "assistant", "content": value["completion"]}]
    if not isinstance(messages, list) or not messages:
        raise RowError("`messages` is not a non-empty list")
    clean = [_check_turn(index, turn) for index, turn in enumerate(messages)]
    if clean[-1]["role"] != "assistant":
        raise RowError(f"last turn is {clean[-1]['role']!r}, not 'assistant'")
    return clean


def _check_turn(index: int, turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {index} is {type(turn).__name__}, not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES:
        raise RowError(f"turn {index} has role {role!r:.80}, not one of {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise RowError(f"turn {index} has content of type {type(content).__name__}, not a string")
    if not content.strip():
        raise RowError(f"turn {index} is empty")
    return {"role": role, "content": content}


def _check_row(source: str, number: int, value: Any, error: str | None, excerpt: str) -> _Row:
    messages = None
    if error is None:
        try:
            messages = json.dumps(normalize_row(value), ensure_ascii=False)
            messages.encode("utf-8")
        except RowError as problem:
            error = str(problem)
        except UnicodeEncodeError:
            error, messages = "text has lone surrogates", None
    shown = None if error is None else excerpt[:_EXCERPT_CHARS].encode("utf-8", "replace").decode()
    return _Row(source, number, messages, error, shown)


def _read_jsonl(path: str, stream: Any) -> Iterator[tuple[Any, str | None, str]]:
    """(value, error, excerpt) of each line; blank lines are errors too, so that counts agree."""
    raw = gzip.GzipFile(fileobj=stream) if path.endswith(".gz") else stream
    lines = io.BufferedReader(raw)  # pyarrow's own files cannot read a line of bounded length
    if lines.peek(3).startswith(codecs.BOM_UTF8):
        lines.read(3)
    while line := lines.readline(MAX_ROW_BYTES + 1):
        excerpt = line[: 4 * _EXCERPT_CHARS].decode("utf-8", "replace")
        if len(line) > MAX_ROW_BYTES:
            while not line.endswith(b"\n") and (line := lines.readline(MAX_ROW_BYTES)):
                pass
            yield None, f"row is longer than {MAX_ROW_BYTES} bytes", excerpt
            continue
        try:
            yield json.loads(line.decode("utf-8")), None, excerpt
        except UnicodeDecodeError as error:
            yield None, f"not UTF-8 ({error.reason} at byte {error.start})", excerpt
        except (ValueError, RecursionError) as error:
            yield None, f"not JSON ({error})", excerpt


def _read_parquet(stream: Any) -> Iterator[tuple[Any, str | None, str]]:
    file = pq.ParquetFile(stream)
    names = file.schema_arrow.names
    wanted = [name for name in ("messages", "prompt", "completion") if name in names]
    for name in wanted:
        if names.count(name) > 1:
            raise pa.ArrowInvalid(f"column {name!r} occurs {names.count(name)} times")
    for batch in file.iter_batches(batch_size=_TABLE_ROWS, columns=wanted):
        for index in range(batch.num_rows):
            try:
                value = {name: batch.column(name)[index].as_py() for name in wanted}
            except UnicodeDecodeError as error:
                yield None, f"not UTF-8 ({error.reason})", ""
                continue
            except Exception as error:  # whatever a value's type makes of it
                yield None, f"cannot be read ({type(error).__name__}: {error})", ""
                continue
            yield value, None, repr(value)[:_EXCERPT_CHARS]
