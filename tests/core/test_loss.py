"""The loss in nats per supervised token, against double precision worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_core.data.collate import IGNORED, Collator
from qlora_core.training.loss import Score, causal_lm_loss, score

VOCABULARY = 11


def reference(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Return nats in all and supervised tokens: -log softmax(z)[y], one token at a time, in float64 without torch."""
    values, wanted = logits.double().numpy(), labels.numpy()
    nats, tokens = 0.0, 0
    for row in range(wanted.shape[0]):
        for position in range(wanted.shape[1] - 1):
            label = wanted[row, position + 1]
            if label != IGNORED:
                z = values[row, position]
                nats += float(np.log(np.exp(z - z.max()).sum()) + z.max() - z[label])
                tokens += 1
    return nats, tokens


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (4, 7, 11) float32 and labels (4, 7), rows with 6, 3, 1 and 0 supervised tokens."""
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (4, 7))
    labels[1, :4] = IGNORED
    labels[2, 1:6] = IGNORED
    labels[3, 1:] = IGNORED
    return torch.randn(4, 7, VOCABULARY) * 3, labels


class Model:
    """Gives the logits that were made for each token id before."""

    def __init__(self) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
        self.seen: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        self.seen.append(inputs)
        return SimpleNamespace(logits=self.table[inputs["input_ids"]])


def test_the_loss_equals_the_mean_over_supervised_tokens_in_double_precision(batch: Any) -> None:
    logits, labels = batch
    nats, tokens = reference(logits, labels)
    assert tokens == 10
    assert causal_lm_loss(SimpleNamespace(logits=logits), labels).item() == pytest.approx(nats / tokens, rel=1e-6)


def test_the_loss_of_half_precision_logits_is_computed_in_single_precision(batch: Any) -> None:
    logits, labels = batch[0].bfloat16(), batch[1]
    nats, tokens = reference(logits.float(), labels)
    loss = causal_lm_loss(SimpleNamespace(logits=logits), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nats / tokens, rel=1e-6)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_losses_of_the_parts_of_a_batch_add_up_to_the_loss_of_the_whole(batch: Any, as_tensor: bool) -> None:
    logits, labels = batch
    nats, tokens = reference(logits, labels)
    items = torch.tensor(tokens) if as_tensor else tokens
    for parts in ([4], [1, 1, 1, 1], [3, 1], [1, 3]):
        pieces = zip(logits.split(parts), labels.split(parts), strict=True)
        total = sum(causal_lm_loss(SimpleNamespace(logits=z), y, items).item() for z, y in pieces)
        assert total == pytest.approx(nats / tokens, rel=1e-6)


def test_the_gradient_is_softmax_minus_one_hot_over_the_number_of_tokens(batch: Any) -> None:
    logits, labels = batch
    logits.requires_grad_(True)
    causal_lm_loss(SimpleNamespace(logits=logits), labels).backward()
    expected = torch.zeros_like(logits, dtype=torch.float64)
    for row, position in (labels[:, 1:] != IGNORED).nonzero().tolist():
        expected[row, position] = logits.detach()[row, position].double().softmax(-1)
        expected[row, position, labels[row, position + 1]] -= 1
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected / 10, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_score_counts_every_supervised_token_the_same_however_batches_are_cut(size: int) -> None:
    torch.manual_seed(2)
    rows = [{"input_ids": torch.randint(0, VOCABULARY, (length,)).tolist()} for length in (9, 2, 5, 1, 7, 7, 3)]
    model = Model()
    batches = [Collator(pad_token_id=3)(rows[start : start + size]) for start in range(0, len(rows), size)]
    result = score(model, batches, device=torch.device("cpu"))
    singles = [(model.table[torch.tensor([row["input_ids"]])], torch.tensor([row["input_ids"]])) for row in rows]
    expected = [reference(z, y) for z, y in singles]
    assert result.tokens == sum(tokens for _, tokens in expected) == 27
    assert result.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(nats for nats, _ in expected) / 27), rel=1e-6)


def test_scoring_passes_on_the_mask_but_neither_labels_nor_a_wish_for_a_cache() -> None:
    model = Model()
    score(model, [Collator()([{"input_ids": [1, 2]}, {"input_ids": [3]}])], device=torch.device("cpu"))
    (inputs,) = model.seen
    assert set(inputs) == {"input_ids", "attention_mask", "use_cache"}
    assert inputs["use_cache"] is False


def test_scoring_keeps_no_graph_and_reports_after_each_batch() -> None:
    model, calls = Model(), []
    model.table.requires_grad_(True)
    batches = [Collator()([{"input_ids": [1, 2, 3]}])] * 3
    score(model, batches, device=torch.device("cpu"), after_batch=lambda: calls.append(torch.is_grad_enabled()))
    assert calls == [False, False, False]
    assert model.table.grad is None


def test_scoring_gathers_rows_from_all_processes() -> None:
    model = Model()
    batches = [Collator()([{"input_ids": [1, 2, 3]}])]
    once = score(model, batches, device=torch.device("cpu"))
    twice = score(model, batches, device=torch.device("cpu"), gather=lambda rows: torch.cat([rows, rows]))
    assert (twice.nats, twice.tokens) == (2 * once.nats, 2 * once.tokens)


def test_a_score_is_nats_over_tokens_and_its_exponential() -> None:
    result = Score(nats=6.0, tokens=4)
    assert result.loss == 1.5
    assert result.perplexity == pytest.approx(math.exp(1.5), rel=1e-12)


def test_a_score_of_nothing_is_no_number_and_one_beyond_all_numbers_is_infinite() -> None:
    assert math.isnan(Score(0.0, 0).loss)
    assert math.isnan(Score(0.0, 0).perplexity)
    assert Score(1e6, 1).perplexity == math.inf
