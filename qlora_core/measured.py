"""What a model gives for batches, the loss and the gradient of every trained parameter, and how far rounding moves it.

Computed as training does it: the same autocast, head and division by the supervised tokens of all batches, but without
dropout. Imported late.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_core.attention import base_of
from qlora_core.calls import calling
from qlora_core.data.collate import IGNORED
from qlora_core.device import pick_precision
from qlora_core.packed import prepare_packed
from qlora_core.providers import Quantizer
from qlora_core.training.head import Head
from qlora_core.training.loss import causal_lm_loss

__all__ = ["Difference", "Measured", "Subject", "limit_of"]

SCALE = 1024.0  # of the loss in float16, whose small gradients would vanish; training does the like

# Two ways to compute the same are about as far apart as two roundings of one way. `Subject.rounding` measures that on the
# model itself, so in any dtype; three times that leaves room for chance. In float32 it is 1e-6 or 1e-5: the least that is
# allowed is above it, for models whose sums are longer, and below what any defect does.
ROOM = 3
LEAST_LOSS, LEAST_GRADIENTS = 1e-5, 1e-4


@dataclass(frozen=True)
class Measured:
    """The loss, in nats per supervised token, and the gradients by parameter, float32 on the CPU."""

    loss: float
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """How far two results are apart, relative to one of them; or how far they may be."""

    loss: float
    gradients: float
    """||g - g'|| / ||g'|| over the gradients of all trained parameters as one vector."""
    where: str = ""
    """The parameter with the largest share of the latter."""

    @classmethod
    def between(cls, one: Measured, other: Measured) -> Difference:
        """Return how far *one* is from *other*."""
        apart = {name: (g - other.gradients[name]).double().square().sum() for name, g in one.gradients.items()}
        size = sum(float(g.double().square().sum()) for g in other.gradients.values())
        far = float(torch.stack([*apart.values()]).sum())
        return cls(
            _relative(abs(one.loss - other.loss), abs(other.loss)),
            _relative(far**0.5, size**0.5),
            max(apart, key=lambda name: float(apart[name])) if far else "",
        )

    @classmethod
    def largest(cls, *differences: Difference) -> Difference:
        """Return the largest loss and the largest gradients of *differences*; what is not a number counts as largest."""
        worst = max(differences, key=lambda one: math.inf if math.isnan(one.gradients) else one.gradients)
        losses = torch.tensor([one.loss for one in differences], dtype=torch.float64)
        return cls(float(losses.max()), worst.gradients, worst.where)

    def within(self, limit: Difference) -> bool:
        """Return whether neither is beyond *limit*; what is not a number is."""
        return self.loss <= limit.loss and self.gradients <= limit.gradients


def limit_of(resolution: float, *roundings: Difference) -> Difference:
    """Return how far results may be apart that only rounding, measured as *roundings*, tells apart.

    A loss is a mean over tokens, whose roundings partly cancel: it moves by less than *resolution*, a single product's error.
    """
    most = Difference.largest(*roundings)
    return Difference(max(LEAST_LOSS, resolution, ROOM * most.loss), max(LEAST_GRADIENTS, ROOM * most.gradients))


class Subject:
    """An adapted model in eval mode, ready to be measured on batches of Collator."""

    def __init__(self, model: torch.nn.Module, quantizer: Quantizer, mixed_precision: str, *, packed: bool = False) -> None:
        """Make *model* ready, for *packed* batches too; raise ModelError where it can't take those."""
        self.model = model.eval()
        self.device = next(model.parameters()).device
        precision = pick_precision(mixed_precision, self.device)
        self._autocast = None if precision == "none" else torch.float16 if precision == "fp16" else torch.bfloat16
        self._scale = SCALE if precision == "fp16" else 1.0
        if packed:
            self.take_packed()
        with self._computing():
            self._head = Head.of(model)
            self.resolution = _resolution(model, quantizer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which products are computed."""
        return self._autocast or base_of(self.model).dtype

    def take_packed(self) -> None:
        """Make the model ready for packed batches; raise ModelError where it can't take them."""
        with self._computing():
            prepare_packed(self.model)

    def measure(self, batches: Sequence[dict[str, Any]]) -> Measured:
        """Return loss and gradients of *batches*, accumulated over them as training accumulates over a step's."""
        self.model.zero_grad(set_to_none=True)
        items = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            taken = {name: value.to(self.device) for name, value in batch.items() if torch.is_tensor(value)}
            labels = taken.pop("labels")
            with self._computing(), self._head.computing(labels, items) as computed:
                outputs = self.model(**taken, use_cache=False)
                loss = causal_lm_loss(outputs, labels, items) if computed.loss is None else computed.loss
            torch.autograd.backward(loss * self._scale)
            total += float(loss.detach())
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        gradients = {name: _gradient(parameter) / self._scale for name, parameter in trained}
        self.model.zero_grad(set_to_none=True)
        return Measured(total, gradients)

    def rounding(self, batches: Sequence[dict[str, Any]], measured: Measured) -> Difference:
        """Return how far *batches* are from what was *measured* of them when each embedding is rounded otherwise.

        From there on every number is, so that this is the distance of two results that differ by rounding alone.
        """
        generator = torch.Generator().manual_seed(0)

        def shake(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            size = 3**0.5 * max(self.resolution, 0.3 * torch.finfo(output.dtype).eps)  # uniform up to it: of that deviation
            noise = torch.rand(output.shape, generator=generator).to(output.device) * 2 - 1
            return (output.float() * (1 + size * noise)).to(output.dtype)

        hook = base_of(self.model).get_input_embeddings().register_forward_hook(shake)
        try:
            return Difference.between(self.measure(batches), measured)
        finally:
            hook.remove()

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            yield


@torch.no_grad()
def _resolution(model: torch.nn.Module, quantizer: Quantizer) -> float:
    """Return the error of a frozen layer's product, relative to it in float32: up to 1e-7, in bfloat16 2e-3, in int8 1e-2."""
    base = base_of(model)
    layers = [layer for layer in base.modules() if quantizer.is_quantized(layer)]
    quantized = bool(layers)
    layers = layers or [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
    dtype = base.get_input_embeddings().weight.dtype
    if not layers:
        return float(torch.finfo(dtype).eps)
    layer: Any = layers[0]
    with calling(quantizer, "dequantize"):
        weight = (quantizer.dequantize(layer) if quantized else layer.weight).float()
    x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    bias = layer.bias.float() if layer.bias is not None else None
    with torch.autocast(weight.device.type, enabled=False):
        exact = torch.nn.functional.linear(x.float(), weight, bias)
    return _relative(float((layer(x).float() - exact).norm()), float(exact.norm()))


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return found.detach().float().cpu()


def _relative(distance: float, size: float) -> float:
    return 0.0 if distance == 0 else distance / size if size else math.inf
