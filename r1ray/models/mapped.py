"""Tensors in memory-mapped files: pages come when they are touched, and go when they are released.

A mapped page counts as resident memory of the process until it is released; then it stays in the
kernel's page cache for as long as there is room, and nothing is copied either way.

Price: reading, a page fault for up to 16 pages that are in the page cache, else a read from the
disk; writing, a fault a page.
"""

import math
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from r1ray.errors import ArtifactError
from r1ray.files import parse_json

__all__ = ["MappedTensors"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100 << 20  # as the safetensors library has it
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a file may be larger than all memory
_READ_AHEAD_BYTES = 128 << 10  # more in one call is left out by a kernel of usual settings


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class MappedTensors(Mapping[str, Tensor]):
    """Named tensors in one file, as views of its pages; equal to itself alone.

    A view is valid for as long as it is held; `release` only gives its memory back.
    """

    def __init__(self, file: IO[Any], mapping: mmap.mmap, entries: Mapping[str, _Entry]) -> None:
        self._file = file
        self._mapping = mapping
        self._entries = dict(entries)

    @classmethod
    def open(cls, path: str | Path) -> "MappedTensors":
        """The tensors of a safetensors file; writing to one changes this process's copy alone.

        Raises:
            ArtifactError: it is not a whole safetensors file.
        """
        try:
            file = Path(path).open("rb")  # noqa: SIM115 - it lives as long as the mapping
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            header = parse_json(file.read(header_bytes).decode("utf-8"))
            size = os.fstat(file.fileno()).st_size
            entries = _read_entries(header, start=8 + header_bytes, size=size)
            mapping = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ArtifactError(f"{path}: cannot be mapped as safetensors ({error!r})") from error
        return cls(file, mapping, entries)

    @classmethod
    def create(cls, directory: str | Path | None, like: Mapping[str, Tensor]) -> "MappedTensors":
        """A new file of zeros with tensors of the dtypes and shapes in `like`.

        It has no name and is gone with the process, however that ends.

        Args:
            directory: on a disk with room for it; None for the system's temporary directory.
        Raises:
            OSError: the disk is full, or the directory cannot be written.
        """
        entries, end = {}, 0
        for name, tensor in like.items():
            begin = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE  # no page belongs to two tensors
            end = begin + tensor.numel() * tensor.element_size()
            entries[name] = _Entry(tensor.dtype, tuple(tensor.shape), begin, end)
        file = tempfile.TemporaryFile(prefix="r1ray-tier-", dir=directory)  # noqa: SIM115 - as above
        os.posix_fallocate(file.fileno(), 0, max(1, end))  # a full disk is an error here
        return cls(file, mmap.mmap(file.fileno(), 0), entries)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self._mapping, dtype=entry.dtype, count=count, offset=entry.begin)
        return flat.view(entry.shape)

    def prefetch(self, name: str) -> None:
        """Let the kernel begin to read a tensor into its page cache; returns at once."""
        step = _READ_AHEAD_BYTES // self._entries[name].dtype.itemsize
        count = math.prod(self._entries[name].shape)
        for start in range(0, count, step):
            self._advise(mmap.MADV_WILLNEED, name, start, min(start + step, count))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Take the pages of elements `start` to `stop` from the process.

        Touching them brings them back as they were. What was written to a tensor that `open` gave
        is lost.
        """
        self._advise(mmap.MADV_DONTNEED, name, start, stop)

    def drop_from_page_cache(self) -> None:
        """Release everything, and let the kernel forget it as well: the disk is read next time."""
        for name in self:
            self.release(name)
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _advise(self, advice: int, name: str, start: int = 0, stop: int | None = None) -> None:
        entry = self._entries[name]
        item = entry.dtype.itemsize
        end = entry.end if stop is None else entry.begin + stop * item
        begin = (entry.begin + start * item) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._mapping.madvise(advice, begin, end - begin)


def _read_entries(header: Mapping[str, object], *, start: int, size: int) -> dict[str, _Entry]:
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(value, dict):
            raise ValueError(f"tensor {name!r} is not described")
        dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
        if not all(type(number) is int and number >= 0 for number in shape):
            raise ValueError(f"tensor {name!r} has the shape {shape}")
        begin, end = (start + offset for offset in value["data_offsets"])
        if end - begin != math.prod(shape) * dtype.itemsize or not start <= begin <= end <= size:
            raise ValueError(f"tensor {name!r} lies outside of the file")
        entries[name] = _Entry(dtype, shape, begin, end)
    return entries
