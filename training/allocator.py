"""glibc told to keep freed memory: a CPU step allocates the same large tensors again and again.

By default every tensor above some MB is mapped and unmapped anew, and the kernel zeroes each of its pages.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Take no allocation by mmap and give none back to the system; False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # -1 as a size: the top of the heap is never trimmed
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
