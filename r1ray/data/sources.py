"""Rows of text from JSONL and Parquet files, each either usable or with the reason why not.

`r1ray.data.schemas` says which rows are usable. A malformed row never stops the reading and is
never dropped: it comes out with an `error` and goes to quarantine.

Price: one pass over each file, in tables of a few hundred rows. A Parquet batch is read at about
64 MiB at most, so that long rows come in smaller batches; a column that no layout uses is not read.
"""

import codecs
import fnmatch
import glob
import gzip
import io
import json
import logging
import os
import reprlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from r1ray.data.schemas import COLUMNS, RowError, normalize_row
from r1ray.errors import ArtifactError, ConfigError

__all__ = [
    "MAX_ROW_BYTES",
    "ROW_SCHEMA",
    "check_row",
    "describe_files",
    "list_files",
    "read_file",
    "read_values",
    "rows_to_table",
    "text_bytes",
]

ROW_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # file, or family for generated rows
        ("row", pa.int64()),  # line or row number in it, from 0
        ("messages", pa.string()),  # JSON list of clean turns; null where error is set
        ("tools", pa.string()),  # JSON list of function definitions, or null
        ("images", pa.list_(pa.binary())),  # PNG files that fit the encoder, or null
        ("ignored", pa.list_(pa.string())),  # names of fields left out, or null
        ("error", pa.string()),
        ("excerpt", pa.string()),  # the beginning of a bad row
    ]
)
logger = logging.getLogger(__name__)

MAX_ROW_BYTES = 8 << 20
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_TABLE_ROWS = 256
_TABLE_BYTES = 64 << 20
_READ_BYTES = 1 << 18  # at once from a compressed or remote file
_EXCERPT_CHARS = 200
_TO_JSON = json.JSONEncoder(ensure_ascii=False).encode

_Read = tuple[Any, str | None, Any]
"""One row as read: value, error if it has none, and what to show of it should it be bad."""


def list_files(paths: Sequence[str], *, key: str = "prepare.sources") -> list[str]:
    """The data files behind `paths` (files, directories, globs, URIs), sorted, each once.

    Files of other kinds in a directory are left out, and their number is logged.

    Args:
        key: of the configuration, for messages.
    Raises:
        ConfigError: a path matches nothing, cannot be listed, or is a file of no supported kind.
    """
    found: set[str] = set()
    for path in paths:
        try:
            matches = _list_uri(path) if "://" in path else _list_local(path, key)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{key}: {path!r} cannot be listed ({error})") from error
        if not matches:
            raise ConfigError(f"{key}: {path!r} matches no {', '.join(_SUFFIXES)} file")
        found.update(matches)
    # What is reached in two ways is one file. Its name, and not that of what it links to, tells how
    # it is read.
    by_file = {
        path if "://" in path else os.path.realpath(path): path
        for path in sorted(found, reverse=True)
    }
    return sorted(by_file.values())


def describe_files(paths: Sequence[str], *, key: str = "prepare.sources") -> dict[str, str]:
    """Size and modification time of every data file: contents may be too large to hash."""
    described = {}
    for path in list_files(paths, key=key):
        filesystem, inner = (
            fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
        )
        info = filesystem.get_file_info(inner)
        described[path] = f"{info.size} bytes, {info.mtime_ns}"
    return described


def _list_local(path: str, key: str) -> list[str]:
    entries = [Path(path)] if os.path.exists(path) else map(Path, glob.glob(path, recursive=True))
    found: list[Path] = []
    for entry in entries:
        if entry.is_dir():
            files = list(_walk(entry))
            usable = [file for file in files if file.name.endswith(_SUFFIXES)]
            if len(usable) < len(files):
                skipped = len(files) - len(usable)
                logger.warning("%s: %d files of other kinds are left out", entry, skipped)
            found += usable
        elif entry.name.endswith(_SUFFIXES) and entry.is_file():
            found.append(entry)
        else:
            raise ConfigError(f"{key}: {entry} is not one of {', '.join(_SUFFIXES)}")
    return list(map(os.path.abspath, found))


def _walk(root: Path) -> Iterator[Path]:
    """The files below `root`, through symbolic links; every directory once, so cycles end."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield from (file for name in names if (file := Path(folder, name)).is_file())


def _list_uri(uri: str) -> list[str]:
    uri = uri.rstrip("/")
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
    scheme, _, rest = uri.partition("://")
    selector = fs.FileSelector(root, recursive=True, allow_not_found=True)
    return [
        f"{scheme}://{rest.replace(path, entry.path, 1)}"  # keeps host and query
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
            batch: list[dict[str, Any]] = []
            num_bytes = 0
            for number, read in enumerate(rows):
                batch.append({"source": path, "row": number, **check_row(*read)})
                num_bytes += sum(len(batch[-1].get(name) or "") for name in ("messages", "tools"))
                if len(batch) == _TABLE_ROWS or num_bytes > _TABLE_BYTES:
                    yield rows_to_table(batch)
                    batch, num_bytes = [], 0
            if batch:
                yield rows_to_table(batch)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def rows_to_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A table of `ROW_SCHEMA` from mappings with its fields; missing ones are null."""
    return pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA)


def check_row(value: Any, error: str | None, shown: Any) -> dict[str, Any]:
    """The text columns of one row, as `ROW_SCHEMA` has them.

    Args:
        value: as read; of no matter where there is an `error`.
        shown: what the excerpt is made of should the row be bad.
    """
    if error is None:
        try:
            found = normalize_row(value)
            messages = _TO_JSON(found.messages)
            tools = None if found.tools is None else _TO_JSON(found.tools)
            (messages + (tools or "")).encode("utf-8")
        except RowError as problem:
            error = str(problem)
        except UnicodeEncodeError:
            error = "text has lone surrogates"
        else:
            return {
                "messages": messages,
                "tools": tools,
                "ignored": list(found.ignored) or None,
            }
    return {"error": error.encode("utf-8", "replace").decode(), "excerpt": _excerpt(shown)}


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _EXCERPT_CHARS


def _excerpt(shown: Any) -> str:
    """The beginning of a line, or of a value, whose repr may be far longer."""
    if isinstance(shown, bytes):
        return shown[: 4 * _EXCERPT_CHARS].decode("utf-8", "replace")[:_EXCERPT_CHARS]
    return _REPR.repr(shown)[:_EXCERPT_CHARS].encode("utf-8", "replace").decode()


def _read_jsonl(path: str, stream: Any) -> Iterator[_Read]:
    """Every line; blank ones are errors too, so that counts agree."""
    raw = stream
    if path.endswith(".gz"):
        raw = gzip.GzipFile(fileobj=stream)
    elif path.endswith(".zst"):
        raw = pa.CompressedInputStream(stream, "zstd")
    # pyarrow's own files cannot read a line of bounded length
    lines = io.BufferedReader(raw, _READ_BYTES)
    if lines.peek(3).startswith(codecs.BOM_UTF8):
        lines.read(3)
    while line := lines.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            begin = line[: 4 * _EXCERPT_CHARS]
            while not line.endswith(b"\n") and (line := lines.readline(MAX_ROW_BYTES)):
                pass
            yield None, f"row is longer than {MAX_ROW_BYTES} bytes", begin
            continue
        try:
            yield json.loads(line.decode("utf-8")), None, line
        except UnicodeDecodeError as error:
            yield None, f"not UTF-8 ({error.reason} at byte {error.start})", line
        except (ValueError, RecursionError) as error:
            yield None, f"not JSON ({error})", line


def _read_parquet(stream: Any) -> Iterator[_Read]:
    file = pq.ParquetFile(stream)
    names = file.schema_arrow.names
    wanted = [name for name in COLUMNS if name in names]
    for name in wanted:
        if names.count(name) > 1:
            raise pa.ArrowInvalid(f"column {name!r} occurs {names.count(name)} times")
    for group in range(file.num_row_groups):
        size = _plan_batch_rows(file.metadata.row_group(group), wanted)
        for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=wanted):
            if "messages" in wanted and batch.column("messages").null_count == 0:
                # This layout wins in every row: what only others use needs no Python objects.
                batch = batch.select(
                    [name for name in ("messages", "system", "tools") if name in wanted]
                )
            yield from _read_batch(batch)


def _plan_batch_rows(group: Any, wanted: Sequence[str]) -> int:
    """Rows of a row group to read at once."""
    columns = [group.column(index) for index in range(group.num_columns)]
    size_bytes = sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.split(".", 1)[0] in wanted
    )
    row_bytes = size_bytes // max(group.num_rows, 1)
    return max(1, min(_TABLE_ROWS, _TABLE_BYTES // max(row_bytes, 1)))


def _read_batch(batch: pa.RecordBatch) -> Iterator[_Read]:
    may_be_long = batch.nbytes > MAX_ROW_BYTES  # no row is longer than all of them
    for value, error, shown in read_values(batch):
        if may_be_long and error is None and text_bytes(value) > MAX_ROW_BYTES:
            yield None, f"row is longer than {MAX_ROW_BYTES} bytes", shown
        else:
            yield value, error, shown


def read_values(batch: pa.RecordBatch) -> Iterator[_Read]:
    """The rows of `batch`: (value, reason why there is none, what an excerpt is made of)."""
    try:
        values = batch.to_pylist()
    except Exception:  # some row has no Python form; the others are found one by one
        values = None
    if values is not None:
        yield from ((value, None, value) for value in values)
        return
    for index in range(batch.num_rows):
        try:
            value = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            yield None, f"not UTF-8 ({error.reason})", b""
        except Exception as error:  # whatever a value's type makes of it
            yield None, f"cannot be read ({type(error).__name__}: {error})", b""
        else:
            yield value, None, value


def text_bytes(value: Any) -> int:
    """Of all texts in `value`, in UTF-8."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(map(text_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(text_bytes, value))
    return len(value) if isinstance(value, bytes) else 0
