"""Score a model on a text: perplexity over the supervised tokens, the base and the adapted model side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_core.libraries import import_libraries

if TYPE_CHECKING:
    import torch

    from qlora_core.data.blocks import Blocks
    from qlora_core.training.loss import Score

__all__ = ["evaluate"]


def evaluate(model: torch.nn.Module, blocks: Blocks, *, batch_size: int = 2, mixed_precision: str = "auto") -> Score:
    """Return the Score of *model* on *blocks*: nats, tokens, loss, perplexity.

    The model is in eval mode meanwhile and afterwards in the mode that it was in before. *mixed_precision* is that of
    `training.mixed_precision`, so that the figures are those of the evaluation lines of a run. Raises ModelError where
    blocks are packed and the model can't keep their samples apart.
    """
    import_libraries()
    import torch
    from torch.utils.data import DataLoader

    from qlora_core.data.collate import Collator
    from qlora_core.device import pick_precision
    from qlora_core.packed import prepare_packed
    from qlora_core.training.loss import score

    device = next(model.parameters()).device
    precision = pick_precision(mixed_precision, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    collator = Collator(packed=blocks.packed)
    batches: DataLoader[Any] = DataLoader(blocks, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    mode = model.training
    model.eval()
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "none"):
            if blocks.packed:
                prepare_packed(model)
            return score(model, batches, device=device)
    finally:
        model.train(mode)
