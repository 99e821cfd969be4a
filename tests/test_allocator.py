"""What becomes of freed memory, seen by the kernel: pages that come back to a process cost a fault each."""

import platform

import pytest
import torch

from core.training import allocator
from core.training.allocator import keep_freed_memory, ordinary_allocation

resource = pytest.importorskip("resource")  # not on Windows
BLOCK = 24 << 20  # bytes
PAGE = resource.getpagesize()


def faults_of_steps(count: int) -> int:
    """Pages that the kernel had to map while eight blocks were written, then all freed, so many times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        step = [torch.ones(BLOCK // 4) for _ in range(8)]
        del step
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone has these settings")
def test_freed_memory_is_kept_and_in_an_ordinary_program_it_is_not():
    assert keep_freed_memory()
    faults_of_steps(4)  # until there is a place for them
    assert faults_of_steps(4) < 8 * BLOCK / PAGE / 100
    with ordinary_allocation():
        # Transparent huge pages, where the system gives them unasked, need one fault for 512 pages.
        assert faults_of_steps(4) >= 8 * BLOCK / PAGE / 512
    faults_of_steps(4)
    assert faults_of_steps(4) < 8 * BLOCK / PAGE / 100


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("was touched"))
    assert not keep_freed_memory()
    with ordinary_allocation():
        pass
