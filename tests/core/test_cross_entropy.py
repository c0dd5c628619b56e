"""The chunked cross-entropy and its gradients, against double precision and against whole logits."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from qlora_core.training.cross_entropy import cross_entropies, mean_cross_entropy

WIDTH, VOCABULARY = 16, 101
Logits = Callable[[torch.Tensor], torch.Tensor]


def error(computed: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the distance of *computed* from *exact*, relative to it."""
    return float((computed.detach().double() - exact).norm() / exact.norm())


def exact(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, items: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient in *rows*, in float64: softmax(z) - one_hot(y), without autograd."""
    z = rows.detach().double() @ weight.detach().double().T
    log_probabilities = z - z.logsumexp(1, keepdim=True)
    gradient = log_probabilities.exp()
    gradient[torch.arange(len(targets)), targets] -= 1
    loss = -log_probabilities[torch.arange(len(targets)), targets].sum() / items
    return loss, gradient @ weight.detach().double() / items


def random(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows (count, H), a head's weight (V, H) and targets (count,), every other one the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    targets[::2] = (rows @ weight.T).argmax(1)[::2]
    return rows, weight, targets


@pytest.mark.parametrize("count", [1, 7, 32, 255, 256, 257, 700])
def test_loss_and_gradient_are_those_of_double_precision(count: int) -> None:
    rows, weight, targets = random(count)
    loss = mean_cross_entropy(lambda chunk: F.linear(chunk, weight), rows, targets, 2 * count)
    (gradient,) = torch.autograd.grad(loss, rows)
    wanted, wanted_gradient = exact(rows, weight, targets, 2 * count)
    assert loss.dtype == torch.float32
    assert error(loss, wanted) < 1e-6
    assert error(gradient, wanted_gradient) < 1e-6
    nats = cross_entropies(lambda chunk: F.linear(chunk, weight), rows, targets)
    assert not nats.requires_grad
    single = F.cross_entropy(rows.double() @ weight.double().T, targets, reduction="none")
    torch.testing.assert_close(nats.double(), single.detach(), rtol=1e-6, atol=2e-6)


def test_in_bfloat16_it_is_no_further_from_the_truth_than_whole_logits() -> None:
    mine, theirs = [], []
    for seed in range(8):
        rows, weight, targets = random(300, torch.bfloat16, seed)
        wanted = exact(rows, weight, targets, 450)
        whole = F.cross_entropy((rows @ weight.T).float(), targets, reduction="sum") / 450
        chunked = mean_cross_entropy(lambda chunk, weight=weight: F.linear(chunk, weight), rows, targets, 450)
        for loss, errors in ((whole, theirs), (chunked, mine)):
            (gradient,) = torch.autograd.grad(loss, rows)
            errors.append((error(loss, wanted[0]), error(gradient, wanted[1])))
    for found, allowed in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True):
        assert median(found) <= 1.05 * median(allowed)


def test_every_parameter_of_the_head_gets_its_gradient_summed_over_the_chunks() -> None:
    rows, _, targets = random(600)
    layer = torch.nn.Linear(WIDTH, VOCABULARY)
    a, b = torch.nn.Parameter(torch.randn(4, WIDTH)), torch.nn.Parameter(torch.randn(VOCABULARY, 4))
    unused = torch.nn.Parameter(torch.ones(3))
    inputs = [rows, layer.weight, layer.bias, a, b]

    def head(chunk: torch.Tensor) -> torch.Tensor:
        return layer(chunk) + chunk @ a.T @ b.T

    loss = mean_cross_entropy(head, rows, targets, 600)
    whole = F.cross_entropy((rows.double() @ (layer.weight + b @ a).double().T + layer.bias.double()), targets)
    for mine, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)
    assert unused.grad is None


def test_gradients_of_half_precision_parameters_are_summed_in_single_precision() -> None:
    rows, weight, targets = random(2560, torch.bfloat16)
    weight.requires_grad_()
    loss = mean_cross_entropy(lambda chunk: F.linear(chunk, weight), rows, targets, 2560)
    whole = F.cross_entropy((rows @ weight.T).float(), targets)
    reference = F.cross_entropy(rows.double() @ weight.double().T, targets)
    wanted = torch.autograd.grad(reference, weight)[0].double()
    (mine,), (theirs,) = torch.autograd.grad(loss, weight), torch.autograd.grad(whole, weight)
    assert mine.dtype == torch.bfloat16
    assert error(mine, wanted) <= 1.05 * error(theirs, wanted)


@pytest.mark.parametrize("trained", [True, False])
def test_where_nothing_is_supervised_the_loss_and_all_gradients_are_0(trained: bool) -> None:
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=trained)
    for items in (0, 12, torch.tensor(0), torch.tensor(12)):
        loss = mean_cross_entropy(lambda chunk: F.linear(chunk, weight), hidden[:0], torch.empty(0, dtype=torch.int64), items)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, [hidden, weight] if trained else [hidden]):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    assert cross_entropies(lambda chunk: F.linear(chunk, weight), hidden[:0], torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_the_backward_pass_scales_what_is_known_and_can_be_repeated() -> None:
    rows, weight, targets = random(40)
    loss = mean_cross_entropy(lambda chunk: F.linear(chunk, weight), rows, targets, 40)
    (once,) = torch.autograd.grad(loss, rows, retain_graph=True)
    (scaled,) = torch.autograd.grad(3 * loss, rows, retain_graph=True)
    torch.testing.assert_close(scaled, 3 * once)
    assert torch.equal(torch.autograd.grad(loss, rows)[0], once)


def test_in_float16_gradients_neither_vanish_nor_overflow_under_a_loss_scale() -> None:
    rows, weight, targets = random(300)
    weight = weight / 100
    half = rows.detach().half().requires_grad_()
    loss = mean_cross_entropy(lambda chunk: F.linear(chunk, weight.half()), half, targets, 1_000_000)
    (gradient,) = torch.autograd.grad(2.0**22 * loss, half)
    _, wanted = exact(half, weight.half(), targets, 1_000_000)
    assert error(gradient.double() / 2**22, wanted) < 2e-3


@pytest.mark.parametrize("offset", [-2e4, 0.0, 2e4])
def test_logits_far_apart_and_far_from_0_are_no_trouble(offset: float) -> None:
    logits = torch.tensor([[0.0, 500.0, -500.0], [-1e4, 1e4, 0.0], [7.0, 7.0, 7.0]]) + offset
    targets = torch.tensor([2, 0, 1])
    nats = cross_entropies(lambda chunk: chunk, logits, targets)
    wanted = F.cross_entropy(logits.double(), targets, reduction="none")
    assert nats.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)


def test_no_more_than_a_chunk_of_logits_is_made_at_a_time_in_few_different_sizes() -> None:
    sizes: list[int] = []

    def head(chunk: torch.Tensor) -> torch.Tensor:
        sizes.append(len(chunk))
        return F.linear(chunk, weight)

    rows, weight, targets = random(1000)
    mean_cross_entropy(head, rows, targets, 1000)
    assert sizes == [256, 256, 256, 256]
    for count in range(1, 80):
        cross_entropies(head, rows[:count], targets[:count])
    assert set(sizes[4:]) == {32, 64, 96}


def test_what_is_drawn_in_the_head_is_drawn_once() -> None:
    """Dropout in a LoRA layer of the head: the gradient is that of the logits whose loss it is."""
    rows, weight, targets = random(64)

    def head(chunk: torch.Tensor) -> torch.Tensor:
        return F.linear(F.dropout(chunk, 0.5), weight)

    torch.manual_seed(3)
    loss = mean_cross_entropy(head, rows, targets, 64)
    torch.manual_seed(3)
    whole = F.cross_entropy(head(rows), targets)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, rows), torch.autograd.grad(whole, rows))


class Exponential(torch.autograd.Function):
    """A function of a stranger that saves what it gives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return dy * y


LAST: dict[str, Logits] = {
    "nothing": lambda logits: logits,
    "a soft cap": lambda logits: 5 * torch.tanh(logits / 5),
    "tanh, which saves what it gives": torch.tanh,
    "a view of what is saved": lambda logits: torch.sigmoid(logits)[:, 1:],
    "a function of a stranger": Exponential.apply,
    "in place": lambda logits: logits.clone().relu_(),
}


@pytest.mark.parametrize("last", LAST)
def test_gradients_are_written_over_logits_only_where_the_head_can_do_without(last: str) -> None:
    rows, weight, targets = random(300)
    weight, targets = weight.requires_grad_(), targets.clamp(max=VOCABULARY - 2)

    def head(chunk: torch.Tensor) -> torch.Tensor:
        return LAST[last](F.linear(chunk, weight))

    loss = mean_cross_entropy(head, rows, targets, 300)
    whole = F.cross_entropy(head(rows), targets)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, [rows, weight]), torch.autograd.grad(whole, [rows, weight]))


def test_another_error_of_the_head_is_passed_on() -> None:
    rows, _, targets = random(40)
    calls: list[int] = []

    def head(chunk: torch.Tensor) -> torch.Tensor:
        calls.append(len(chunk))
        raise RuntimeError("not enough memory")

    with pytest.raises(RuntimeError, match="not enough memory"):
        mean_cross_entropy(head, rows, targets, 40)
    assert len(calls) == 1
