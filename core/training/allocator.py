"""Whether the C library returns freed memory to the system or keeps it for reuse."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt, from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Larger blocks get a mapping of their own and are returned when freed, so they leave no half-used holes. This is the
# largest value that glibc's adaptive threshold reaches (mallopt(3)); setting it turns the adaptation off.
_LARGE = 32 << 20
_KEEP = {_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: -1}
_ORDINARY = {_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: 2 * _LARGE}


def keep_freed_memory() -> bool:
    """Keep freed memory in the process for the next allocation; False where that is not possible (not glibc).

    The next training step allocates as much again, and the kernel would have to zero and map every page anew.
    """
    return _set(_KEEP)


@contextmanager
def ordinary_allocation() -> Iterator[None]:
    """Inside the block memory is returned as in a program that has set nothing; afterwards it is kept."""
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
    if trim:  # return what was kept so far
        library.malloc_trim(0)
    return taken == [1] * len(options)
