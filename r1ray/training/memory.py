"""Activation memory that is allocated once and reused, on a CPU.

Torch has a caching allocator for CUDA; on a CPU every large tensor is mapped afresh and unmapped
when it is freed, and the kernel clears its pages again in each step. With bucketed or packed
batches the same few shapes come back, so freed blocks fit the next request: the C library is told
to keep them, in one heap for all threads. It reads these settings when a process starts.

Gain and price are measured by `jobs.bench_batching` (`batching.preallocation_gain`): less time in
page faults, against memory that is not given back to the system while the worker lives.

Source: mallopt(3) of the GNU C library; others ignore the settings.
"""

__all__ = ["KEEP_FREED_MEMORY"]

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}
"""Environment of a training process on a CPU."""
