"""Set-up that every command shares: threads, numerics."""

from __future__ import annotations

import os

import torch


def cpu_cores() -> int:
    """Cores this process may run on (a container or taskset may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(local_ranks: int = 1) -> int:
    """Give this process its share of the cores as torch threads, and return it.

    `accelerate launch` sets OMP_NUM_THREADS=1 for CPU runs, which would leave the other cores idle.
    """
    threads = max(1, cpu_cores() // local_ranks)
    torch.set_num_threads(threads)
    return threads
