"""Set options of glibc's memory allocator. Other C libraries are left as they are."""

from __future__ import annotations

import ctypes

#: The option's number in glibc's malloc.h, and its value in bytes.
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 256 * 1024


def return_large_blocks() -> None:
    """Make the allocator return each large block to the operating system when it is freed.

    By default glibc raises its threshold for that, up to 32 MiB, and keeps freed blocks: forty
    responses of 12 MB left half a gigabyte of unused memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def return_free_memory() -> None:
    """Return free memory to the operating system."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
