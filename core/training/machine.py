"""What the machine can do, known before anything is started on it."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32 or bf16; `auto` is bf16 where the device computes in it."""
    return wanted if wanted != "auto" else "bf16" if native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself, so that it beats fp32; False where this cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    flags = set(cpuinfo("flags|Features").split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def cpuinfo(key: str) -> str:
    """The first value of a key in Linux's description of the processor, else nothing."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^(?:{key})\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""
