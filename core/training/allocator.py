"""What the C library does with freed memory: gives it back to the system, or keeps it for the next use."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Larger blocks are mapped for themselves and given back when freed, so that no half-used hole of theirs is ever kept.
# It is the most that glibc's own adaptive threshold comes to (mallopt(3)), and setting it ends the adapting.
_LARGE = 32 << 20
_KEEP = {_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: -1}
_ORDINARY = {_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: 2 * _LARGE}


def keep_freed_memory() -> bool:
    """Keep freed memory in the process for what is allocated next; False where that cannot be arranged (not glibc).

    A training step on a CPU frees all it allocates, and the next one allocates as much again. Memory that went back to
    the system meanwhile returns as pages that the kernel must zero and map one by one. The price: a process stays about
    as large as it ever was.
    """
    return _set(_KEEP)


@contextmanager
def ordinary_allocation() -> Iterator[None]:
    """Inside, memory is given back as in a program that has set nothing; afterwards it is kept."""
    _set(_ORDINARY, trim=True)
    try:
        yield
    finally:
        _set(_KEEP)


def _set(options: dict[int, int], trim: bool = False) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    taken = [library.mallopt(option, value) for option, value in options.items()]
    if trim:  # what was kept until now
        library.malloc_trim(0)
    return taken == [1] * len(options)
