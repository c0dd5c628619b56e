"""The loss of causal language models, in nats per supervised token.

Training and scoring let the head compute it (`Head`), so that whole logits are never there; `causal_lm_loss` computes it from
logits, where a model's have to be whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from qlora_core.data.collate import IGNORED, REAL_TOKENS
from qlora_core.training.head import Head, next_tokens

__all__ = ["Score", "causal_lm_loss", "score"]


def causal_lm_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Return the cross-entropy of the next token, summed over supervised tokens and divided by their number.

    `outputs.logits`: (B, T, V); labels: (B, T) int64, IGNORED where not supervised; position t predicts label t + 1.
    *num_items_in_batch* counts the supervised tokens of the whole accumulated batch, so that gradients do not depend on
    how it is split; by default those of this batch are counted.
    """
    logits = outputs.logits.float().flatten(0, 1)
    targets = next_tokens(labels).flatten().to(logits.device)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


@dataclass(frozen=True)
class Score:
    """What a model pays for a text: `nats` in all over `tokens` supervised tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.nats / self.tokens if self.tokens else float("nan")

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        try:
            return float(torch.tensor(self.loss, dtype=torch.float64).exp())
        except OverflowError:
            return float("inf")


@torch.no_grad()
def score(
    model: Callable[..., Any],
    batches: Iterable[dict[str, Any]],
    *,
    device: torch.device,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    after_batch: Callable[[], object] = lambda: None,
    head: Head | None = None,
) -> Score:
    """Return the score of *model* on *batches* of Collator; every supervised token counts the same, however they are cut.

    *gather* collects a tensor of (B, 2) from all processes, without rows that only fill the last batch. *head* is that of
    *model*, by default looked up.
    """
    head = Head.of(model) if head is None else head
    nats, tokens = 0.0, 0
    for batch in batches:
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        labels = inputs.pop("labels")
        inputs.pop(REAL_TOKENS, None)
        with head.computing(labels) as computed:
            logits = model(**{**inputs, "use_cache": False}).logits
        targets = next_tokens(labels)
        losses = computed.nats
        if losses is None:
            losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        rows = torch.stack([losses.view_as(targets).double().sum(1), (targets != IGNORED).double().sum(1)], dim=1)
        total = gather(rows).sum(0)
        nats, tokens = nats + float(total[0]), tokens + int(total[1])
        after_batch()
    return Score(nats, tokens)
