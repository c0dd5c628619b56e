"""Stop a run before NaN or infinity gets into its weights, and say where it came from: step, sample, layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_core.attention import base_of
from qlora_core.errors import RunError

if TYPE_CHECKING:
    from qlora_core.training.trainer import QLoRATrainer

__all__ = ["Guard"]

Batch = dict[str, Any]
SHOWN = 24  # tokens of a sample in the message


class Guard:
    """Looks at the losses and the gradient of each step of *trainer* before the optimizer does."""

    def __init__(self, trainer: QLoRATrainer) -> None:
        self.trainer = trainer
        self.batches: list[Batch] = []
        self.losses: list[Tensor] = []

    def note(self, batch: Batch, loss: Tensor) -> None:
        """Keep a batch of the step in progress, and its loss."""
        self.batches.append(batch)
        self.losses.append(loss.detach())

    def check(self, grad_norm: float) -> None:
        """Raise RunError where a loss of the step or the norm of its gradient is not finite; else begin another step."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(1)
        # gradients of float16 may be infinite: its scaler passes over the step then, and scales less
        scaled = self.trainer.accelerator.scaler is not None
        if bool(losses.isfinite().all()) and (scaled or math.isfinite(grad_norm)):
            self.batches, self.losses = [], []
            return
        step = self.trainer.state.global_step + 1
        broken = losses[~losses.isfinite()]
        what = f"the loss is {float(broken[0])}" if len(broken) else f"the norm of the gradient is {grad_norm}"
        raise RunError(
            f"training: {what} at step {step}, {self._origin()}; {self.trainer.run.saved()}; start again with a lower "
            "training.learning_rate, without that sample, or with training.mixed_precision: none"
        )

    def _origin(self) -> str:
        """Return where it came from: the weights, a layer and a sample, or a gradient."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
                return f"first in the weights {_plain(name)}"
        for batch in self.batches:
            for row in range(len(batch["input_ids"])):
                alone = _cut(batch, row)
                loss, layers = self._forward(model, alone)
                if layers or not math.isfinite(loss):
                    where = _plain(layers[0]) if layers else "the loss itself"
                    return f"first in {where}, for {self._sample(alone['input_ids'][0], row)}"
        model.zero_grad()  # what is there now has been divided by the norm
        for batch in self.batches:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(batch))
            loss.backward()
        gradients = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        # the last one, for the backward pass comes there first
        return f"first in the gradient of {_plain(gradients[-1])}" if gradients else "in the sum of its gradients"

    def _forward(self, model: torch.nn.Module, batch: Batch) -> tuple[float, list[str]]:
        """Return the loss of *batch*, and the modules whose outputs are not finite, in the order in which they end."""
        found: list[str] = []
        with _noting(base_of(model), found), torch.no_grad(), self.trainer.compute_loss_context_manager():
            loss, _ = self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(batch), return_outputs=True)
        return float(loss), found

    def _sample(self, ids: Tensor, row: int) -> str:
        text = self.trainer.processing_class.decode(ids[:SHOWN].tolist())
        return f"row {row + 1} of its batch, which begins {text!r}"


def _cut(batch: Batch, row: int) -> Batch:
    """Return one row of *batch*; what has another length than its rows stays whole."""
    rows = len(batch["input_ids"])
    return {
        name: value[row : row + 1] if torch.is_tensor(value) and value.ndim and len(value) == rows else value
        for name, value in batch.items()
    }


def _plain(name: str) -> str:
    """Return the name of a module or parameter without what PEFT puts before it."""
    return name.removeprefix("base_model.model.")


@contextlib.contextmanager
def _noting(model: torch.nn.Module, found: list[str]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and not bool(first.isfinite().all()):
                found.append(name)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
