"""What a forward pass keeps for the backward pass, and which part of which layer keeps it; measured, and thrown away."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from qlora_core.training.available import used_bytes

__all__ = ["Activations", "Place", "measure"]

Place = tuple[int, str]
"""A layer by its index, and the name of its part; "" is the whole layer."""


@dataclass
class _Memory:
    """A piece of memory that a tensor is in: its bytes, and the places that keep it; () keeps it outside of all layers."""

    bytes: int
    keepers: set[Place | tuple[()]] = field(default_factory=set)


class Activations:
    """What was kept, in bytes, by whom, and how long each part took, in seconds."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.identities = _Identities()
        self.weights = {self.identities.of(storage) for tensor in weights for storage in _storages(tensor)}
        self.memory: dict[int, _Memory] = {}
        self.inputs: dict[Place, set[int]] = defaultdict(set)
        self.passing = 0
        """Bytes that were in use at most and are not kept."""
        self._times: dict[Place, float] = {}

    @property
    def places(self) -> list[Place]:
        """All places that were run, in order."""
        return list(self._times)

    def seconds(self, name: str) -> float:
        """Return the time that the parts called *name* took together: the median, which forgets a slow start, of each."""
        times = [spent for (_, part), spent in self._times.items() if part == name]
        return statistics.median(times) * len(times) if times else 0.0

    def kept(self, again: Sequence[Place]) -> int:
        """Return the bytes kept at most if the places *again* are computed again: their inputs, and one of them at a time."""
        chosen = set(again)
        inputs = {key for place in again for key in self.inputs[place]}
        total = 0
        one: dict[Place, int] = defaultdict(int)
        for key, memory in self.memory.items():
            if key in inputs or any(_within(keeper, chosen) is None for keeper in memory.keepers):
                total += memory.bytes
                continue
            for place in {_within(keeper, chosen) for keeper in memory.keepers}:
                assert place is not None
                one[place] += memory.bytes
        return total + max(one.values(), default=0)

    def add(self, tensor: torch.Tensor) -> Iterator[int]:
        """Yield the keys of the memory that *tensor* is in, weights excepted."""
        for storage in _storages(tensor):
            key = self.identities.of(storage)
            if key not in self.weights:
                self.memory.setdefault(key, _Memory(storage.nbytes()))
                yield key


class _Identities:
    """Numbers for pieces of memory, whose addresses are given away again as soon as they are let go of."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._count = itertools.count()

    def of(self, storage: Any) -> int:
        """Return the number of *storage*. (torch's own weak references would keep its memory.)"""
        known = self._known.get(storage._cdata)
        if known is None or known[0]() is not storage:
            known = self._known[storage._cdata] = weakref.ref(storage), next(self._count)
        return known[1]


def _within(keeper: Place | tuple[()], chosen: set[Place]) -> Place | None:
    """Return the place among *chosen* that *keeper* is or is a part of."""
    if not keeper:
        return None
    return keeper if keeper in chosen else whole if (whole := (keeper[0], "")) in chosen else None


def measure(layers: Sequence[torch.nn.Module], model: torch.nn.Module, forward: Callable[[], Any]) -> Activations:
    """Return what *forward* keeps, which runs *model*, of *layers*, with gradients. It is let go of at once.

    So the pass takes little more memory than one without gradients. Modes and random generators stay as they are.
    """
    weights = [*model.parameters(), *model.buffers()]
    found, device = Activations(weights), weights[0].device
    stack: list[Place | tuple[()]] = [()]
    before = used_bytes(device)

    def keep(tensor: torch.Tensor) -> torch.Tensor | None:
        for key in found.add(tensor):
            found.memory[key].keepers.add(stack[-1])
        found.passing = max(found.passing, used_bytes(device) - before)
        return None if stack[-1] else tensor  # the loss may have its gradient made already in the forward pass

    def enter(place: Place, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found.inputs[place].update(key for tensor in tensors for key in found.add(tensor))
        stack.append(place)
        found._times[place] = found._times.get(place, 0.0) - _now(device)

    def leave(place: Place, module: torch.nn.Module, args: Any, output: Any) -> None:
        found._times[place] += _now(device)
        stack.pop()

    with _watched(layers, enter, leave), _set_aside(model, device), torch.autograd.graph.saved_tensors_hooks(keep, _kept):
        forward()
    found.passing = max(found.passing, used_bytes(device) - before)
    return found


@contextlib.contextmanager
def _watched(layers: Sequence[torch.nn.Module], enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    handles = []
    for index, layer in enumerate(layers):
        for name, module in [("", layer), *layer.named_children()]:
            before, after = (_bound(call, (index, name)) for call in (enter, leave))
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bound(call: Callable[..., None], place: Place) -> Callable[..., None]:
    return lambda *args: call(place, *args)


@contextlib.contextmanager
def _set_aside(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put *model* in training mode, and afterwards its mode and the generators back."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _kept(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise RuntimeError("what layers keep was thrown away: this pass was only to be measured")
    return tensor


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _storages(tensor: torch.Tensor) -> Iterator[Any]:
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif tensor.device.type != "meta":
        yield tensor.untyped_storage()
