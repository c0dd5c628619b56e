"""What a reading depends on: the machine, its libraries, and the model's size. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "qlora-core")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


def machine() -> dict[str, Any]:
    """Return the facts of this machine: cores, processor, its vector instructions, faster dtype, memory in bytes, versions."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "flags": [flag for flag in FLAGS if flag in _field("/proc/cpuinfo", "flags").split()],
        "dtype": dtype(),
        "memory": int((_field("/proc/meminfo", "MemTotal").split() or ["0"])[0]) * 1024,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def dtype() -> str:
    """Return the dtype in which the processor multiplies matrices faster: float32 where bfloat16 is emulated."""
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(_field("/proc/cpuinfo", "flags").split()) else "float32"


def parameters(model: Path) -> int:
    """Return the parameters of the model in the folder *model*, read from the headers of its safetensors files."""
    count = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _field(path: str, name: str) -> str:
    if not Path(path).is_file():
        return ""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
