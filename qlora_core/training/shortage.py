"""When memory runs out, or a process that reads data is killed: what it was needed for, and what takes less."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

from qlora_core.config import RunConfig
from qlora_core.device import peak_memory_bytes, pick_device
from qlora_core.errors import RunError
from qlora_core.training.available import available_bytes

__all__ = ["explained"]

ASKED = re.compile(r"allocate (\d[\d.]*) ?(bytes|[KMG]iB)", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# as torch, and the allocator of C++ below it, say it on a CPU; CUDA has a class of its own
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc")


@contextlib.contextmanager
def explained(config: RunConfig, stage: str, saved: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn running out of memory in *stage*, or the end of a process that reads data, into a RunError with sizes and remedies.

    *saved*, called then, says what is left to go on from.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RunError(_advice(config, stage, saved, str(error))) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RunError(_worker(stage, saved, str(error))) from error
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise RunError(_advice(config, stage, saved, str(error))) from error
        raise


def _advice(config: RunConfig, stage: str, saved: Callable[[], str] | None, what: str) -> str:
    device = pick_device()
    asked, left = ASKED.search(what), available_bytes(device)
    sizes = [f"{peak_memory_bytes(device) / 1e9:.2f} GB were in use at most"]
    if asked:
        sizes.append(f"{float(asked[1]) * UNITS[asked[2].lower()] / 1e9:.2f} GB more were asked for")
    if left is not None:
        sizes.append(f"{left / 1e9:.2f} GB are left {'here' if device.type == 'cpu' else f'on {device}'}")
    return "; ".join([f"memory ran out in {stage}: {', '.join(sizes)}", _remedy(config, stage), *([saved()] if saved else [])])


def _remedy(config: RunConfig, stage: str) -> str:
    """Return what takes less memory than *config* does, the cheapest in time first."""
    training, data = config.training, config.data
    if stage.startswith("loading"):
        return "choose a smaller model, or free memory that other programs hold"
    remedies = []
    if training.gradient_checkpointing != "full":
        remedies.append("training.gradient_checkpointing: full")
    if training.batch_size > 1:
        half = training.batch_size // 2
        accumulated = -(-training.gradient_accumulation * training.batch_size // half)
        remedies.append(f"training.batch_size: {half} with training.gradient_accumulation: {accumulated}")
    if data.sequence_length > 128:
        remedies.append(f"data.sequence_length: {data.sequence_length // 2}")
    at = f"{training.batch_size} x {data.sequence_length} tokens per forward pass"
    return f"it held {at}; set {', or '.join(remedies) or 'a smaller model'}"


def _worker(stage: str, saved: Callable[[], str] | None, what: str) -> str:
    killed = re.search(r"by signal: ([^.]+)", what)
    how = f"was killed ({killed[1].strip()})" if killed else "ended"
    remedy = "set training.extra.dataloader_num_workers: 0, or resume"
    said = f"a process that reads data {how} in {stage}, as systems do when memory runs out"
    return "; ".join([said, *([saved()] if saved else []), remedy])
