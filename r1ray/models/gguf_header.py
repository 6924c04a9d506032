"""Whether a GGUF file's header holds what it says, checked before the gguf library reads it.

The library takes every count at its word and goes on behind the end of the file: a header of a
hundred bytes can have it fill all memory.

1. Keys with their values, then the descriptions of tensors, are walked through as the format has
   them; nothing is kept.
2. Every length must end within the file, and all entries together must be no more than
   `_MAX_ENTRIES`, since the library makes objects of some hundred bytes of each.

Price: about a microsecond a string, 0.3 s for a vocabulary of 150,000 with its merges.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import os
from pathlib import Path
from typing import IO

from r1ray.errors import ArtifactError

__all__ = ["check_gguf_header"]

_MAX_ENTRIES = 4_000_000
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_gguf_header(path: str | Path) -> None:
    """Return if the header of the file `path` keeps to the format and to the file's size.

    Raises:
        ArtifactError: it does not, or there is no file.
    """
    try:
        with Path(path).open("rb") as stream:
            _Header(stream).check()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as GGUF ({error})") from error


class _Header:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = os.fstat(stream.fileno()).st_size
        self._entries = 0

    def check(self) -> None:
        if self._read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number(4)) not in (2, 3):
            raise ValueError(f"its version is {version}, not 2 or 3")
        num_tensors, num_keys = self._number(8), self._number(8)
        for _ in range(num_keys):
            self._count(1)
            self._skip_string()
            self._skip_value(self._number(4))
        for _ in range(num_tensors):
            self._count(1)
            self._skip_string()
            if (num_dims := self._number(4)) > _MAX_DIMS:
                raise ValueError(f"a tensor has {num_dims} dimensions, more than {_MAX_DIMS}")
            self._skip(8 * num_dims + 4 + 8)

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip_string()
        elif kind != _ARRAY:
            self._skip(self._scalar_bytes(kind))
        else:
            kind, count = self._number(4), self._number(8)
            self._count(count)
            if kind != _STRING:
                self._skip(count * self._scalar_bytes(kind))
                return
            for _ in range(count):
                self._skip_string()

    def _scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise ValueError(f"a value is of kind {kind}, which is unknown or an array in an array")
        return _SCALAR_BYTES[kind]

    def _count(self, entries: int) -> None:
        self._entries += entries
        if self._entries > _MAX_ENTRIES:
            raise ValueError(f"its header has more than {_MAX_ENTRIES} entries")

    def _skip_string(self) -> None:
        self._skip(self._number(8))

    def _number(self, size: int) -> int:
        return int.from_bytes(self._read(size), "little")

    def _read(self, size: int) -> bytes:
        self._take(size)
        return self._stream.read(size)

    def _skip(self, size: int) -> None:
        self._take(size)
        self._stream.seek(size, os.SEEK_CUR)

    def _take(self, size: int) -> None:
        if size > self._left:
            raise ValueError(f"{size} bytes are to follow where the file has {self._left}")
        self._left -= size
