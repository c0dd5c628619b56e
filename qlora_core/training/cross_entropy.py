"""The cross-entropy of rows of hidden states, a chunk of rows at a time: logits of more than a chunk are never held.

The gradient is computed together with the loss, while a chunk's logits are there, so the backward pass only scales it. A head
of any kind is run under autograd, chunk by chunk: plain, quantised, with LoRA, with rows of new tokens, trained as a whole.

Measured on 2 CPU cores (AVX-512 BF16), forward and backward of 1,024 rows x 576 x 49,152 in bfloat16, milliseconds and MB:
whole logits 606 and 579; here in chunks of 64, 128, 256, 512 rows 512, 397, 365, 400 and 70, 87, 114, 186; torch's
`F.linear_cross_entropy` 2,279 and 193 with default options, 339 and 97 in chunks of 256, but for plain linear heads only.
Since then gradients are written over logits, which takes another 25 MB off in chunks of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

__all__ = ["LOSSES_OF_LOGITS", "LossesOfLogits", "cross_entropies", "mean_cross_entropy"]

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Gives logits (n, V) for hidden states (n, H)."""

LossesOfLogits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]
"""What computes as `_Tile` does, of *logits, targets, gradient, factor*, or returns None where it does not know these.

What it writes to *gradient* must raise that tensor's version, as torch's operations do: by that autograd notices that logits
which it has saved were written over.
"""

LOSSES_OF_LOGITS = "losses_of_logits"
"""The attribute of a head module in which kernels may leave a LossesOfLogits."""

TILE = 16  # rows whose logits are turned to float32 at a time: on CPUs they stay in the cache


@torch.no_grad()
def cross_entropies(
    logits_of: Logits, rows: torch.Tensor, targets: torch.Tensor, losses_of: LossesOfLogits | None = None
) -> torch.Tensor:
    """Return the cross-entropies (N,) float32, nats, of *targets* (N,) int64 given hidden states *rows* (N, H)."""
    tile = _Tile(losses_of)
    nats = [tile(logits_of(chunk), wanted) for chunk, wanted in _chunks(rows, targets)]
    return torch.cat(nats)


def mean_cross_entropy(
    logits_of: Logits,
    rows: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor | float,
    losses_of: LossesOfLogits | None = None,
) -> torch.Tensor:
    """Return the sum of the cross-entropies, divided by *items*: () float32, differentiable once.

    Gradients go to *rows* and to every trained parameter that *logits_of* uses. Those of logits are rounded to their dtype
    after the division, as autograd would do it; in float16, where they would vanish, before. Those of parameters are summed
    over the chunks in float32. Those of logits are written over them, unless the head needs these once more:
    autograd notices where a function has saved them.
    """
    try:
        return _mean(logits_of, rows, targets, items, _Tile(losses_of), overwrite=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    return _mean(logits_of, rows, targets, items, _Tile(losses_of), overwrite=False)


def _mean(
    logits_of: Logits,
    rows: torch.Tensor,
    targets: torch.Tensor,
    items: torch.Tensor | float,
    tile: _Tile,
    *,
    overwrite: bool,
) -> torch.Tensor:
    sums, done = dict[torch.Tensor, torch.Tensor](), 0
    # made before all chunks: what stays must not be put where a chunk's logits were, or the next find no room there
    into_rows = torch.empty_like(rows, requires_grad=False)
    total = rows.new_zeros((), dtype=torch.float32)
    factor = torch.as_tensor(items, device=rows.device).clamp(min=1).float().reciprocal()
    late = False
    with torch.no_grad():
        for chunk, wanted in _chunks(rows, targets):
            with torch.enable_grad():
                logits = logits_of(chunk.requires_grad_())
            edge = torch.autograd.graph.get_gradient_edge(logits)  # now: that of a view changes when it is written over
            late = logits.dtype == torch.float16
            into_logits = logits.detach() if overwrite else torch.empty_like(logits)
            total += tile(logits.detach(), wanted, into_logits, None if late else factor).sum()
            parameters = [leaf for leaf in _leaves(edge.node) if leaf is not chunk]
            into_chunk, *into = torch.autograd.grad(edge, [chunk, *parameters], into_logits)
            del logits, into_logits  # or two chunks' would be held at once
            into_rows[done : done + len(wanted)] = into_chunk[: len(wanted)]
            done += len(wanted)
            for parameter, part in zip(parameters, into, strict=True):
                sums[parameter] = sums[parameter].add_(part) if parameter in sums else part.float()
    given = [into_rows, *(value.to(parameter.dtype) for parameter, value in sums.items())]
    mean: torch.Tensor = _Given.apply(total * factor, factor if late else None, given, rows, *sums)  # type: ignore[no-untyped-call]
    return mean


class _Given(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, factor: torch.Tensor | None, gradients: list[torch.Tensor], *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        ctx.factor = factor
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> Any:
        scale = incoming if ctx.factor is None else incoming * ctx.factor
        # in float32, for a loss scaled for float16 comes with more than float16 can hold
        scaled = [(gradient.float() * scale).to(gradient.dtype) for gradient in ctx.saved_tensors]
        return None, None, None, *scaled


class _Tile:
    """Cross-entropies and their gradients, a few rows at a time, in a float32 buffer that is used again.

    Where *losses_of* knows the logits, it computes them.
    """

    def __init__(self, losses_of: LossesOfLogits | None = None) -> None:
        self.losses_of, self.buffer = losses_of, torch.empty(0)

    def __call__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        gradient: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the cross-entropies (n,) float32 of *targets* (n,), given *logits* (m, V) of at least as many rows.

        *gradient* (m, V), which may be *logits*, is overwritten with the gradients in *logits*, times *factor*; rows that have
        no target get 0.
        """
        found = None if self.losses_of is None else self.losses_of(logits, targets, gradient, factor)
        if found is not None:
            return found
        nats = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        size = TILE if logits.device.type == "cpu" else 8 * TILE
        if not self.buffer.numel():
            self.buffer = torch.empty(size, logits.shape[1], dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), size):
            wanted = targets[start : start + size, None]
            here = slice(start, start + len(wanted))
            values = self.buffer[: len(wanted)].copy_(logits[here])
            highest, own = values.amax(1, keepdim=True), values.gather(1, wanted)
            torch.softmax(values, 1, out=values)
            # log sum exp(z) = max z - log max softmax(z): the largest probability is never too small for a logarithm
            nats[here] = (highest - own - values.amax(1, keepdim=True).log_())[:, 0]
            if gradient is not None:
                values.scatter_add_(1, wanted, torch.full_like(own, -1.0))
                gradient[here] = values if factor is None else values.mul_(factor)
        if gradient is not None:
            gradient[len(targets) :] = 0
        return nats


def _chunks(rows: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield hidden states (m, H), detached, and their targets (n,); on CPUs m is n rounded up, and at least one row comes.

    At least one, so that a head's parameters get a gradient, of 0, where nothing is supervised: other processes wait for it.
    The sizes for GPUs are a guess: products of more rows use them better, and memory is no issue yet. They were never run.
    """
    # on CPUs bfloat16 kernels are compiled, and kept, for each number of rows
    size, step = (256, 32) if rows.device.type == "cpu" else (1024, 1)
    rows = rows.detach()
    for start in range(0, max(len(rows), 1), size):
        chunk, wanted = rows[start : start + size], targets[start : start + size]
        rest = -max(len(chunk), 1) % step + (len(chunk) == 0)
        yield F.pad(chunk, (0, 0, 0, rest)) if rest else chunk, wanted


def _leaves(output: torch.autograd.graph.Node) -> list[torch.Tensor]:
    """Return the tensors that gradients of *output* arrive at, in the order in which they are met."""
    found, seen = [], set()
    ahead: list[Any] = [output]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the end of a branch
            found.append(node.variable)
        ahead.extend(before for before, _ in node.next_functions)
    return found
