"""Pick the kernels of a run, by name or by device, and apply them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qlora_core.calls import answered, calling, named
from qlora_core.config import RunConfig
from qlora_core.errors import ConfigError, PluginError, Problem, QLoRAError
from qlora_core.parts import Parts
from qlora_core.provenance import describe_provider
from qlora_core.providers import Kernels

if TYPE_CHECKING:
    import torch

__all__ = ["apply_kernels"]

logger = logging.getLogger("qlora_core")


def apply_kernels(model: torch.nn.Module, config: RunConfig, parts: Parts) -> Kernels | None:
    """Let the kernels of *parts* rewrite *model* in place and return them; with *auto_kernels* the most suitable, if any."""
    chosen = _most_suitable(config, parts) if parts.auto_kernels else next(iter(parts.kernels), None)
    if chosen is not None:
        with calling(chosen, "apply"):
            applied = chosen.apply(model)
        if applied is not model:
            raise PluginError(f"{named(chosen)}: apply must rewrite the model in place and return it (got {applied!r:.80})")
    return chosen


def _most_suitable(config: RunConfig, parts: Parts) -> Kernels | None:
    """Return the kernels that suit the device best, of those that can work in this run and say a rank above 0."""
    from qlora_core.device import pick_device

    device = pick_device().type
    ranks: dict[str, tuple[int, Kernels]] = {}
    for kernels in parts.kernels:
        name = describe_provider(kernels)["provider"]
        try:
            with calling(kernels, "suits"):
                rank = answered(kernels, "suits", kernels.suits(device), int, "a whole number")
            if rank > 0:
                with calling(kernels, "check"):
                    kernels.check(config, parts)
                with calling(kernels, "missing"):
                    rank = 0 if kernels.missing() else rank
        except QLoRAError as error:
            logger.warning("kernels: auto leaves out %r: %s", name, error)
            continue
        if rank > 0:
            ranks[name] = rank, kernels
    best = max((rank for rank, _ in ranks.values()), default=0)
    equal = sorted(name for name, (rank, _) in ranks.items() if rank == best)
    if len(equal) > 1:
        names = " and ".join(repr(name) for name in equal)
        raise ConfigError([Problem(("kernels",), f"auto can't choose between {names}, which suit {device} equally; name one")])
    return ranks[equal[0]][1] if equal else None
