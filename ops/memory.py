"""Keep the memory of freed tensors in the process: glibc otherwise gives large tensors fresh pages again and again.

Every fresh page is a fault of some microseconds, which costs more than what most ops do with it: a clone of 67 MB takes
16 000 faults, each time. The price is that memory once used stays with the process until it ends.
"""

import ctypes
import os
import sys

# Names and numbers of <malloc.h>; the environment variable and the tunable by which a user sets the same.
_M_TRIM_THRESHOLD = (-1, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold")
_M_TOP_PAD = (-2, "MALLOC_TOP_PAD_", "glibc.malloc.top_pad")
_M_MMAP_THRESHOLD = (-3, "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold")
_M_MMAP_MAX = (-4, "MALLOC_MMAP_MAX_", "glibc.malloc.mmap_max")
_LARGEST = 2**31 - 1
_HEAP = 64 * 2**20  # of a thread that is not the main one, at most


def keep_pages() -> dict[str, int]:
    """Make malloc reuse the pages of freed tensors -> what was set; nothing outside Linux with glibc.

    In the thread that calls it; in others, tensors up to 64 MB. (M_ARENA_MAX=1 would serve those too, but their scraps,
    see below, made the heap grow by a tensor at a time.) What the user has set by MALLOC_* or GLIBC_TUNABLES stays.
    """
    if not is_glibc():
        return {}
    changed: dict[str, int] = {}

    def change(option: tuple[int, str, str], value: int) -> bool:
        number, variable, tunable = option
        if variable in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", ""):
            return True
        accepted = bool(ctypes.CDLL(None).mallopt(ctypes.c_int(number), ctypes.c_int(value)))
        if accepted:
            changed[tunable] = value
        return accepted

    change(_M_TRIM_THRESHOLD, -1)  # never give the top of the heap back
    # mmap only from 2 GB on. Some versions of glibc refuse more than 32 MB: there, not at all.
    if not change(_M_MMAP_THRESHOLD, _LARGEST):
        change(_M_MMAP_MAX, 0)
    change(_M_TOP_PAD, _HEAP)  # nor a whole heap of another thread
    _fill_thread_cache()
    return changed


def _fill_thread_cache() -> None:
    """Leave glibc's per-thread cache no room for the scraps that aligning tensors cuts off.

    A scrap in the cache is not merged with its neighbors: the hole that a freed tensor leaves is then too small for the
    next one of the same size, and the heap grows by up to eight times the largest tensor before that ends.
    """
    malloc = ctypes.CDLL(None).malloc
    malloc.argtypes = [ctypes.c_size_t]
    malloc.restype = ctypes.c_void_p
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    for scrap in [malloc(size) for size in range(24, 200, 16) for _ in range(7)]:
        free(scrap)


def is_glibc() -> bool:
    """Whether this process runs on Linux with glibc (and not musl, whose malloc has no such settings)."""
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False
