"""Large products of bfloat16, in two halves where these are quicker: to some shapes oneDNN gives one thread, however many wait.

On 2 cores with AMX 1,024 x 1,536 x 576 (rows, in, out) came out at 1,330 GFLOP/s, and at 2,050 in two halves of the columns;
1,024 x 576 x 1,536 at 2,500, and at 1,400 in halves. Which shapes these are was not to be foreseen, so each is tried once on a
machine. What was found stays on disk, for halves may be summed in another order, and a run that is resumed has to halve what it
halved before.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_core.demo_model import cache_folder

__all__ = ["add_product", "has_amx"]

logger = logging.getLogger("qlora_core")

LEAST, MOST = 2**27, 2**31  # multiplications: less is over before it matters, and what is larger went to all threads
GAIN = 1.15  # what halves must bring: where a thread was idle it was 1.3 to 1.6
ROUNDS = 9
STEP = 32  # columns that the first half is a multiple of: what the units for bfloat16 take at a time


@functools.cache
def _cpu() -> dict[str, Any]:
    """Return what torch knows of the CPU; older versions don't tell."""
    return getattr(torch.cpu, "get_capabilities", dict)()  # type: ignore[no-any-return]


def has_amx() -> bool:
    """Return whether the CPU multiplies tiles of bfloat16."""
    return bool(_cpu().get("amx_bf16"))


def add_product(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Add x w to y (rows, out) in place, and return it; x: (rows, in), w: (in, out)."""
    rows, inner, columns = *x.shape, w.shape[1]
    matters = x.dtype == torch.bfloat16 and x.device.type == "cpu" and LEAST <= rows * inner * columns <= MOST and has_amx()
    if matters and halves_are_quicker(rows, inner, columns, w.stride(0) == 1, torch.get_num_threads()):
        return _add_halves(y, x, w)
    return y.addmm_(x, w)


def _add_halves(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    half = -(-w.shape[1] // (2 * STEP)) * STEP
    y[:, :half].addmm_(x, w[:, :half])
    y[:, half:].addmm_(x, w[:, half:])
    return y


@functools.cache
def halves_are_quicker(rows: int, inner: int, columns: int, transposed: bool, threads: int) -> bool:
    """Return what was found on this machine, with these *threads*; measures and keeps it where nothing was.

    *transposed* is whether the weight (in, out) is that of a layer (out, in), transposed. What can't be kept is not halved: a
    resumed run would not know.
    """
    if threads == 1:
        return False
    try:
        file = cache_folder() / "products.json"
    except RuntimeError:  # who has no home
        return False
    machine = f"{_cpu().get('cpu_name')}, L2 {_cpu().get('l2_cache_size')}, torch {torch.__version__}"
    key = f"{machine}, {threads} threads: {rows} x {inner} x {columns}{' transposed' if transposed else ''}"
    if key not in _read(file):
        found = _measured(rows, inner, columns, transposed) > GAIN
        _write(file, {key: found, **_read(file)})  # what another process found meanwhile stands
    return _read(file).get(key, False)


def _measured(rows: int, inner: int, columns: int, transposed: bool) -> float:
    """Return how many times the speed of the whole product that of halves is, by the best of some rounds."""
    x, y = (torch.zeros(rows, size, dtype=torch.bfloat16) for size in (inner, columns))
    w = torch.zeros(columns, inner, dtype=torch.bfloat16).t() if transposed else torch.zeros(inner, columns, dtype=x.dtype)
    ways: tuple[Callable[[], Tensor], ...] = (lambda: y.addmm_(x, w), lambda: _add_halves(y, x, w))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for way, times in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
    whole, halves = (min(times) for times in seconds)  # the best: other work on the machine only ever adds
    return whole / halves


def _read(file: Path) -> dict[str, bool]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, found: dict[str, bool]) -> None:
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=0, sort_keys=True), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        logger.debug("kernels fused: which products are quicker in halves can't be kept in %s: %s", file, error)
