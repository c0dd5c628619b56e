"""Memory that a training step frees, kept in the process for the next: new pages cost more time than what is done in them."""

from __future__ import annotations

import ctypes

__all__ = ["keep_pages"]

# mallopt(3): the parameters' numbers in glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
LARGE = 2**25  # bytes; the most that M_MMAP_THRESHOLD may be


def keep_pages(largest: int) -> bool:
    """Let the C library give freed memory back to the system only at the end; return whether it does (glibc only).

    Each step needs the same memory again, and new pages cost more time than what is done in them.

    *largest* is the size of the largest weight, bytes. From LARGE on, blocks of that size are given back all the same: of
    several such sizes none fits into the gaps that others leave. Four layers of Llama 7B's size, in float32, peaked at
    5.26 GB with all pages kept, and at 1.19 GB so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    blocks = (M_MMAP_MAX, 0) if largest < LARGE else (M_MMAP_THRESHOLD, LARGE)
    settings = ((M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1), blocks)
    return all(mallopt(name, value) for name, value in settings)
