"""What this machine computes on: the device, its number formats, and how much memory was used."""

from __future__ import annotations

import os
import resource
import sys
from typing import Literal

import torch

__all__ = ["peak_memory_bytes", "pick_device", "pick_dtype", "pick_precision", "supports_bf16"]

Precision = Literal["bf16", "fp16", "none"]


def pick_device() -> torch.device:
    """Return the device that a run uses: this process's CUDA device, else XPU, else the CPU."""
    for kind in ("cuda", "xpu"):
        if getattr(torch, kind).is_available():
            return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def supports_bf16(device: torch.device) -> bool:
    """Return whether *device* multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    return device.type == "xpu"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the load dtype for *name*; "auto" is bfloat16 where *device* has it, float16 on older GPUs, else float32."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if supports_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def pick_precision(name: str, device: torch.device) -> Precision:
    """Return the autocast precision for `training.mixed_precision`: "bf16", "fp16" or "none"."""
    if name == "auto":
        return "bf16" if supports_bf16(device) else "fp16" if device.type == "cuda" else "none"
    assert name in ("bf16", "fp16", "none")
    return name  # type: ignore[return-value]


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes used so far: allocated on a CUDA device, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
