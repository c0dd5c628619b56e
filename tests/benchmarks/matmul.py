"""How fast this machine multiplies matrices, in its faster dtype: the bound that no training step can pass.

    python matmul.py [--size 2048] [--repetitions 12]

Prints one JSON object: FLOP per second of each repetition, the best and the median of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from machine import dtype


def rates(size: int, repetitions: int, dtype: torch.dtype) -> list[float]:
    """Return FLOP/s of each product of two matrices (size, size), after two to warm up."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    measured = []
    for _ in range(repetitions + 2):
        started = time.perf_counter()
        left @ right.T  # as a linear layer does: (T, d_in) by (d_out, d_in), transposed
        measured.append(2 * size**3 / (time.perf_counter() - started))
    return measured[2:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=12)
    options = parser.parse_args()
    with torch.inference_mode():
        measured = rates(options.size, options.repetitions, getattr(torch, dtype()))
    print(json.dumps({"rates": measured, "best": max(measured), "median": statistics.median(measured)}))


if __name__ == "__main__":
    main()
