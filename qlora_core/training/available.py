"""Memory that can be used and that is used: of a device, or of this process within its machine and control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["available_bytes", "used_bytes"]

ROOT = Path("/")


def available_bytes(device: torch.device, root: Path = ROOT) -> int | None:
    """Return the bytes that *device* can still give this process, or None where that is not known (a CPU without Linux).

    On a CPU that is what the machine has left, and what each control group that the process is in has left (*root* is where
    `proc` and `sys` are), divided among the processes that torchrun started here.
    """
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        free: int = backend.mem_get_info(device)[0]
        return free + int(backend.memory_reserved(device) - backend.memory_allocated(device))
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    return min(machine, *_left_in_groups(root), machine) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def used_bytes(device: torch.device) -> int:
    """Return the bytes allocated on *device*; on a CPU the resident bytes of this process that are no files (0: unknown)."""
    if device.type != "cpu":
        return int(getattr(torch, device.type).memory_allocated(device))
    try:
        _, resident, shared, *_ = (ROOT / "proc/self/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what is left of the limit of each control group of memory above this process, of version 2 and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left(folder, *names)
            if left is not None:
                yield left
            if folder == top:
                break


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """Return the bytes that the group at *folder* may still take, the cache of files that it can drop included."""
    try:
        most, used = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(most) - int(used) + int(stat.get(cache, 0)))
    except (OSError, ValueError):  # no such group here, or `max`
        return None
