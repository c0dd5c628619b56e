"""What the CPU has, beyond what every CPU has."""

from __future__ import annotations

import functools

import torch

__all__ = ["has_amx"]


@functools.cache
def has_amx() -> bool:
    """Return whether the CPU multiplies tiles of bfloat16 (AMX), rounds to it, and lets this process do both.

    Versions of torch that don't tell count as without.
    """
    capable = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capable.get("amx_bf16") and capable.get("avx512_bf16")) and bool(torch.cpu._init_amx())
