"""What the CPU has, beyond what every CPU has."""

from __future__ import annotations

import functools

import torch

__all__ = ["has_amx"]


@functools.cache
def has_amx() -> bool:
    """Return whether the CPU multiplies tiles (AMX) and lets this process do so, which is asked of the system here."""
    return bool(torch.cpu._is_amx_tile_supported()) and bool(torch.cpu._init_amx())
