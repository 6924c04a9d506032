"""Peaks of this process's resident memory, as the kernel counts them."""

import ctypes
import gc
from pathlib import Path

__all__ = ["read_peak", "reset_peak"]


def reset_peak() -> int:
    """Give free memory back, set the kernel's peak to what is resident, and return that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _read("VmRSS")


def read_peak() -> int:
    """Most bytes resident at once since `reset_peak`: anonymous, file-mapped and shared."""
    return _read("VmHWM")


def _read(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
