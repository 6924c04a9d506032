"""Activation memory that is allocated once and reused, on a CPU.

Torch has a caching allocator for CUDA; on a CPU every large tensor is mapped afresh and unmapped
when it is freed, and the kernel clears its pages again in each step. With bucketed or packed
batches the same few shapes come back, so freed blocks fit the next request: the C library is told
to keep them.

Gain and price are measured by `jobs.bench_batching` (`batching.preallocation_gain`): less time in
page faults, against memory that is not given back to the system while the worker lives.
"""

import ctypes
import logging

__all__ = ["keep_freed_memory"]

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of the GNU C library
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell malloc to reuse freed blocks of any size in this process; False where it cannot be told.

    To be called before the large allocations: it does not move those that exist.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        logger.debug("this C library has no mallopt; freed memory goes back to the system")
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(name, value) == 1 for name, value in settings)
