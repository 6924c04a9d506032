"""Tensors in memory-mapped files: pages come when they are touched, and go when they are released.

A mapped page counts as resident memory of the process until it is released; then it stays in the
kernel's page cache for as long as there is room, and nothing is copied either way.

Price: a page fault for 16 pages that are in the page cache, else a read from the disk.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1ray.errors import ArtifactError

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


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class MappedTensors(Mapping[str, Tensor]):
    """Named tensors in one file, as views of its pages.

    A view is valid for as long as it is held; `release` only gives its memory back.
    """

    def __init__(self, mapping: mmap.mmap, entries: Mapping[str, _Entry]) -> None:
        self._mapping = mapping
        self._entries = dict(entries)

    @classmethod
    def open(cls, path: str | Path) -> "MappedTensors":
        """The tensors of a safetensors file; writing to one changes this process's copy alone.

        Raises:
            ArtifactError: it is not a whole safetensors file.
        """
        try:
            with Path(path).open("rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
                if header_bytes > _MAX_HEADER_BYTES:
                    raise ValueError(f"a header of {header_bytes} bytes")
                header = json.loads(file.read(header_bytes))
                size = os.fstat(file.fileno()).st_size
                entries = _read_entries(header, start=8 + header_bytes, size=size)
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=protection)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ArtifactError(f"{path}: cannot be mapped as safetensors ({error!r})") from error
        return cls(mapping, entries)

    @classmethod
    def create(cls, path: str | Path, like: Mapping[str, Tensor]) -> "MappedTensors":
        """A new file of zeros with tensors of the dtypes and shapes in `like`.

        Its blocks are taken from the disk as they are written, so it must have room for them.
        """
        entries, end = {}, 0
        for name, tensor in like.items():
            begin = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE  # no page belongs to two tensors
            end = begin + tensor.numel() * tensor.element_size()
            entries[name] = _Entry(tensor.dtype, tuple(tensor.shape), begin, end)
        with Path(path).open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, end))  # a full disk is an error here
            mapping = mmap.mmap(file.fileno(), 0)
        return cls(mapping, entries)

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
        self._advise(mmap.MADV_WILLNEED, name)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Take the pages of elements `start` to `stop` from the process.

        Touching them brings them back as they were. What was written to a tensor that `open` gave
        is lost.
        """
        self._advise(mmap.MADV_DONTNEED, name, start, stop)

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
        begin, end = (start + offset for offset in value["data_offsets"])
        if end - begin != math.prod(shape) * dtype.itemsize or not start <= begin <= end <= size:
            raise ValueError(f"tensor {name!r} lies outside of the file")
        entries[name] = _Entry(dtype, shape, begin, end)
    return entries
