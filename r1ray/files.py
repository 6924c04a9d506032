"""Files that others wrote and JSON that others sent: read within limits, kept where they belong.

1. A path must lead to a regular file: a pipe would block forever, and a device never end.
2. A file must be no larger than its kind gets, since it is in memory as a whole.
3. JSON must be no deeper than any that r1ray has a use for: what reads it next is recursive.
4. Symbolic links may lead in from anywhere, since users name what is read; none leads out of where
   r1ray itself writes.

Price: one stat a file; of JSON with more than `MAX_JSON_DEPTH` brackets, a look at every container.
"""

import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1ray.errors import ArtifactError

__all__ = [
    "MAX_JSON_DEPTH",
    "RECORD_BYTES",
    "TABLE_BYTES",
    "check_file",
    "is_inside",
    "own_temp_dir",
    "parse_json",
    "read_json",
    "read_text",
]

MAX_JSON_DEPTH = 64
RECORD_BYTES = 16 << 20
"""Of what describes something: a manifest of 80,000 files, a model's configuration."""
TABLE_BYTES = 1 << 30
"""Of what grows with the data: vocabularies, histories of training, counts of lengths."""


def check_file(path: str | Path, *, max_bytes: int) -> None:
    """Raise ArtifactError unless there is a regular file of at most `max_bytes` at `path`."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path}: is no regular file; put one there")
    if found.st_size > max_bytes:
        raise ArtifactError(
            f"{path}: has {found.st_size} bytes, and the most for such a file is {max_bytes}; "
            "it is damaged, or not what its name says"
        )


def read_text(path: str | Path, *, max_bytes: int) -> str:
    """The UTF-8 text in the file `path`.

    Raises:
        ArtifactError: it is missing, no regular file, too large or not UTF-8.
    """
    check_file(path, max_bytes=max_bytes)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error


def read_json(path: str | Path, *, max_bytes: int = RECORD_BYTES) -> Any:
    """The JSON value in the file `path`.

    Raises:
        ArtifactError: as `read_text`, or it is not JSON, or nested too deep.
    """
    text = read_text(path, max_bytes=max_bytes)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: cannot be read as JSON ({error})") from error


def parse_json(text: str, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The JSON value in `text`.

    Args:
        parse_constant: what to make of NaN, Infinity and -Infinity; None takes them.
    Raises:
        ValueError: not JSON, a number of too many digits, or nested deeper than `MAX_JSON_DEPTH`.
    """
    try:
        value = json.loads(text, parse_constant=parse_constant)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from error
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        _check_depth(value)
    return value


def is_inside(path: str | Path, directory: str | Path) -> bool:
    """Whether `path` is below `directory` when all symbolic links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def own_temp_dir(name: str) -> Path:
    """A directory that this user alone can write, below the temporary one and found there again.

    Raises:
        ArtifactError: someone else has put something there.
    """
    directory = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ArtifactError(
            f"{directory}: is no directory that this user alone can write; remove it, or set "
            "TMPDIR to a directory of your own"
        )
    return directory


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
