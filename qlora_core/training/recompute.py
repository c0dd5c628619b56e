"""Gradient checkpointing: which activations a training step keeps, and which it computes a second time. Imported late.

`none` keeps all, `full` only the input of each layer. `selective` computes again those parts of layers that give back the
most memory for their time, found in one forward pass of the run's own shape; `auto` is the first of the three for which there
is room, by the same pass, or by one of a short row where there is plenty. The bits of losses and gradients are those of `none`:
what is computed again draws the same random numbers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_core.attention import base_of
from qlora_core.errors import ModelError
from qlora_core.training.activations import Activations, Place, measure
from qlora_core.training.available import available_bytes

__all__ = ["MODES", "Mode", "Needs", "Plan", "choose", "keep_all", "layers_of", "plan", "recompute", "settle", "upper_bound"]

logger = logging.getLogger("qlora_core")

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")

EVERY_SECOND = "every second layer"
CACHES = ("past_key_values", "past_key_value", "layer_past")  # a part that is run again would write to them twice
SHARE = 1 / 3  # of what whole layers give back: parts are taken until they give back as much
SPREAD = {"cpu": 1.5}  # times what is kept, for gaps between it and what passes; measured on CPUs
ELSEWHERE = 1.2  # a guess, never measured
FIXED = 100 * 2**20  # what libraries set up in the first step
ROOM = 0.75  # of the available memory is planned with: estimates were up to 24 % too low
PART = 4  # times shorter is the row that shows whether there is plenty of memory

Forward = Callable[[int, int], Any]
"""Runs a forward pass, loss included, of so many rows of so many tokens."""


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that checkpointing is about, as transformers knows them, in the order of the model."""
    base: Any = base_of(model)
    names = set(getattr(base, "_no_split_modules", None) or ())
    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in base.modules():
        if module not in inside and (isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names):
            found.append(module)
            inside.update(module.modules())
    return found


class _Recomputed:
    """Stands for the forward of *module*: in training it keeps the inputs only, and runs again in the backward pass."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.own, self.usual = module, vars(module).get("forward"), module.forward
        functools.update_wrapper(self, self.usual)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cached = any(kwargs.get(name) is not None for name in CACHES)
        if cached or not (self.module.training and torch.is_grad_enabled()):
            return self.usual(*args, **kwargs)
        return checkpoint(self.usual, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own


def recompute(modules: Sequence[torch.nn.Module]) -> None:
    """Let each of *modules* keep only its inputs in training."""
    for module in modules:
        module.forward = _Recomputed(module)


def keep_all(model: torch.nn.Module) -> None:
    """Undo `recompute` wherever it was done in *model*."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _Recomputed):
            forward.remove()


@dataclass(frozen=True)
class Needs:
    """Bytes that a training step takes on top of what is there before the first one, for each way; estimates."""

    none: int
    selective: int
    full: int

    def __str__(self) -> str:
        return ", ".join(f"{_gigabytes(self.of(mode))} with {mode}" for mode in MODES)

    def of(self, mode: Mode) -> int:
        """Return the bytes of *mode*."""
        return {"none": self.none, "selective": self.selective, "full": self.full}[mode]


@dataclass(frozen=True)
class Plan:
    """What `selective` computes again, in words and as modules, and what the three ways need."""

    what: str
    modules: tuple[torch.nn.Module, ...]
    needs: Needs


def upper_bound(model: torch.nn.Module, forward: Forward, rows: int, tokens: int) -> int:
    """Return bytes that a step of *rows* x *tokens* is not expected to exceed, found by a short row.

    As if everything grew with the square of the length, as the scores of attention do where a kernel keeps them. What passes
    does not show in a pass that finds room in pages that are there already; it is taken to be as much again.
    """
    part = -(-tokens // PART)
    kept = measure(layers_of(model), model, lambda: forward(1, part)).kept([])
    return _fixed(model) + int(rows * (tokens / part) ** 2 * (1 + _spread(model)) * kept)


def plan(model: torch.nn.Module, forward: Callable[[], Any]) -> Plan:
    """Return the plan for *model*, in training mode; *forward* runs the forward pass of a step, loss included, once."""
    layers = layers_of(model)
    found = measure(layers, model, forward)
    whole = [(layer, "") for layer in range(len(layers))]
    names = _worth_it(found, whole)
    places = [place for place in found.places if place[1] in names]
    what = " and ".join(names) + " of each layer"
    if not names:
        places, what = whole[::2], EVERY_SECOND
    modules = tuple(layers[layer].get_submodule(name) for layer, name in places)
    fixed, spread = _fixed(model) + found.passing, _spread(model)
    none, selective, full = (fixed + int(spread * found.kept(again)) for again in ([], places, whole))
    return Plan(what, modules, Needs(none, selective, full))


def _fixed(model: torch.nn.Module) -> int:
    """Return the bytes of gradients, of two moments of the optimizer, and of what libraries set up."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + FIXED


def _spread(model: torch.nn.Module) -> float:
    return SPREAD.get(next(model.parameters()).device.type, ELSEWHERE)


def _worth_it(found: Activations, whole: list[Place]) -> list[str]:
    """Return the names of parts that give back more bytes per second than whole layers, best first; maybe none."""
    everything = found.kept([])
    most = everything - found.kept(whole)
    given: dict[str, int] = {}
    for name in sorted({name for _, name in found.places if name}):
        given[name] = everything - found.kept([place for place in found.places if place[1] == name])
        logger.debug("gradient checkpointing: %s: %.1f MB, %.3f s", name, given[name] / 1e6, found.seconds(name))
    chosen: list[str] = []
    for name in sorted(given, key=lambda name: -given[name] / max(found.seconds(name), 1e-9)):
        if given[name] <= 0 or sum(given[one] for one in chosen) >= SHARE * most:
            break
        chosen.append(name)
    total, seconds = sum(given[name] for name in chosen), sum(found.seconds(name) for name in chosen)
    enough = total >= SHARE * most and total * found.seconds("") > most * seconds
    return chosen if enough else []


def choose(needs: Needs, available: int) -> Mode:
    """Return the fastest way for which *available* bytes are enough, with some room left."""
    return next((mode for mode in MODES if needs.of(mode) <= ROOM * available), "full")


def settle(
    model: torch.nn.Module,
    wanted: Literal["selective", "auto"],
    forward: Forward,
    rows: int,
    tokens: int,
    agree: Callable[[Mode], Mode] = lambda mode: mode,
) -> Mode:
    """Return what comes of *wanted*, and make *model* ready for it; `full` is left to the caller. Say in a line why.

    *forward* runs a step of *rows* x *tokens*, for `auto` a part of it first; *agree* gives all processes the same answer.
    """
    base = base_of(model)
    if not layers_of(model) or not base.supports_gradient_checkpointing:
        if wanted == "selective":
            where = "training.gradient_checkpointing"
            raise ModelError(f"{where}: {type(base).__name__} has no layers that can be computed again; set it to none")
        logger.info("gradient checkpointing: none, %s has no layers that can be computed again", type(base).__name__)
        return "none"
    keep_all(model)
    mode: Mode = "selective"
    why, found = "", None
    if wanted == "auto":
        mode, why, found = _automatic(model, forward, rows, tokens)
    mode = agree(mode)
    what = ""
    if mode == "selective":
        if found is None:
            found, why = _planned(model, lambda: forward(rows, tokens))
        recompute(found.modules if found is not None else layers_of(model)[::2])
        what = f" ({found.what if found is not None else EVERY_SECOND})"
    logger.info("gradient checkpointing: %s%s%s", mode, what, why and f"; {why}")
    return mode


def _automatic(model: torch.nn.Module, forward: Forward, rows: int, tokens: int) -> tuple[Mode, str, Plan | None]:
    """Return the fastest way for which there is memory, why, and the plan, where one had to be made."""
    available = available_bytes(next(model.parameters()).device)
    if available is None:
        return "none", "how much memory is available is not known", None
    try:
        most = upper_bound(model, forward, rows, tokens)
        if most <= ROOM * available:
            return "none", f"a step needs less than {_gigabytes(most)}, {_gigabytes(available)} available", None
    except Exception as error:
        logger.debug("gradient checkpointing: a short row could not be measured: %s", error)
    found, why = _planned(model, lambda: forward(rows, tokens))
    if found is None:
        return "full", why, None
    return choose(found.needs, available), f"a step needs about {found.needs}, {_gigabytes(available)} available", found


def _planned(model: torch.nn.Module, forward: Callable[[], Any]) -> tuple[Plan | None, str]:
    """Return the plan for *model*, or None and why there is none."""
    try:
        return plan(model, forward), ""
    except Exception as error:  # of a stranger's model, or out of memory; a step may still be possible
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
