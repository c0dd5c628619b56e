"""The output head of a causal language model, made to compute losses where it would compute logits.

The model's own forward runs as it is, whatever wraps it; only its head's is exchanged for the time of a call. The loss is
computed within it, so in the autocast, the process group and the gathered weights of that place, and what comes out as
`logits` is empty, (B, T, 0). What a model does to its logits after the head (soft caps, factors) is found by giving it numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers

from qlora_core.data.collate import IGNORED
from qlora_core.training.cross_entropy import LOSSES_OF_LOGITS, LossesOfLogits, cross_entropies, mean_cross_entropy

__all__ = ["Computed", "Head", "next_tokens"]

logger = logging.getLogger("qlora_core")

Step = Callable[[torch.Tensor], torch.Tensor]

# What configurations call the numbers that logits are multiplied by, divided by, and capped at
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return what each position predicts, (B, T) int64, given labels (B, T): the next label; nothing at the end."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


@dataclass
class Computed:
    """What a head has computed in a forward pass; both are None where it gave logits as ever."""

    loss: torch.Tensor | None = None
    """() float32, nats per item, with its gradient; of a pass with gradients."""
    nats: torch.Tensor | None = None
    """(B, T) float32, for each position, 0 where it is not supervised; of a pass without."""


@dataclass(frozen=True)
class Head:
    """The *module* that makes logits of hidden states, and the step *after* it; no module: whole logits are needed.

    *losses_of* computes losses of logits, where kernels have left it in the module.
    """

    module: torch.nn.Module | None = None
    after: Step = lambda logits: logits
    losses_of: LossesOfLogits | None = None

    @classmethod
    def of(cls, model: object) -> Head:
        """Return the head of *model*, wrapped or not; costs two forward passes of six tokens, generators stay as they are.

        Whole logits are needed where the model does to them what isn't known here, where it doesn't call its head just once,
        where it is compiled, and where it is run by torch.nn.DataParallel, which copies it.
        """
        if not isinstance(model, torch.nn.Module):
            return cls()
        base = next((module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)), None)
        reason = _obstacle(model, base)
        if base is not None and reason is None:
            try:
                return _probed(model, base)
            except Exception as error:  # whatever a stranger's model raises; its usual forward is still to be tried
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        logger.debug("loss: %s computes whole logits: %s", type(base if base is not None else model).__name__, reason)
        return cls()

    @contextlib.contextmanager
    def computing(self, labels: torch.Tensor, items: torch.Tensor | int | None = None) -> Iterator[Computed]:
        """Let the head compute losses of *labels* (B, T) instead of logits in the one forward pass that is made meanwhile.

        With gradients, the loss is the sum over supervised tokens divided by *items*, by default their number.
        """
        computed = Computed()
        if self.module is None:
            yield computed
            return

        def forward(original: Step, hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden[:, -labels.shape[1] :]  # prompt tuning puts some before
            targets = next_tokens(labels).to(hidden.device)
            supervised = targets != IGNORED
            wanted, rows = targets[supervised], hidden.flatten(0, 1).index_select(0, supervised.flatten().nonzero()[:, 0])

            def logits_of(chunk: torch.Tensor) -> torch.Tensor:
                return self.after(original(chunk[None])).squeeze(0)  # not [0], whose gradient is a copy

            if not torch.is_grad_enabled():
                nats = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
                computed.nats = nats.masked_scatter_(supervised, cross_entropies(logits_of, rows, wanted, self.losses_of))
                return hidden[..., :0]
            count = supervised.sum().clamp(min=1) if items is None else items
            computed.loss = mean_cross_entropy(logits_of, rows, wanted, count, self.losses_of)
            # what looks in the output for what is trained finds it; a clone, for some models change logits in place
            return computed.loss.expand(*hidden.shape[:2], 0).clone()

        with _exchanged(self.module, forward):
            yield computed


@contextlib.contextmanager
def _exchanged(module: torch.nn.Module, forward: Callable[[Step, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Run *forward*, given the one that it takes the place of, whenever *module* is called."""
    own = vars(module).get("forward")  # of accelerate, which moves weights and tensors
    original = module.forward
    module.forward = lambda hidden: forward(original, hidden)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _obstacle(model: torch.nn.Module, base: transformers.PreTrainedModel | None) -> str | None:
    if base is None:
        return "it holds no transformers model"
    if not isinstance(base.get_output_embeddings(), torch.nn.Module):
        return "it has no head"
    if isinstance(model, torch.nn.DataParallel):
        return "it is run by DataParallel"
    if hasattr(model, "_orig_mod") or getattr(base, "_compiled_call_impl", None) is not None:
        return "it is compiled"
    return None


def _probed(model: torch.nn.Module, base: transformers.PreTrainedModel) -> Head:
    """Return the head of *model* and what is done to its output, or raise ValueError.

    The head gives numbers of our own, far apart, for two rows of three tokens, and what the model makes of them must be what
    a known step makes of them, to the bit. Then losses are computed once, for the model may not like logits that are empty.
    """
    module, device = base.get_output_embeddings(), next(base.parameters()).device
    given: list[torch.Tensor] = []

    def forward(original: Step, hidden: torch.Tensor) -> torch.Tensor:
        logits = original(hidden)
        given.append(torch.linspace(-60, 60, logits.numel(), device=logits.device).view(logits.shape).to(logits.dtype))
        return given[0].clone()  # some models change it in place

    ids = torch.arange(6, device=device).view(2, 3)
    # not in eval mode: dropout makes no difference here, and some layers would repack their weights
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        with _exchanged(module, forward):
            logits = model(input_ids=ids, use_cache=False).logits
        if len(given) != 1 or given[0].ndim != 3 or given[0].shape != logits.shape:
            raise ValueError("its logits are not what its head gives when it is called once")
        for step in _steps(base.config):
            if torch.equal(step(given[0]).float(), logits.float()):
                head = Head(module, step, getattr(module, LOSSES_OF_LOGITS, None))
                with head.computing(ids):
                    model(input_ids=ids, use_cache=False)
                return head
    raise ValueError("what it does to logits after the head is not known")


def _steps(config: Any) -> Iterator[Step]:
    """Yield the steps that a model of *config* may take after its head, those of most parts last."""
    text = config.get_text_config()

    def named(names: tuple[str, ...]) -> list[float]:
        values = [getattr(text, name, None) for name in names]
        return [value for value in values if isinstance(value, int | float) and value]

    scales = [None, *((1, factor) for factor in named(FACTORS)), *((0, divisor) for divisor in named(DIVISORS))]
    for scale, cap in itertools.product(scales, [None, *named(CAPS)]):

        def step(logits: torch.Tensor, scale: tuple[int, float] | None = scale, cap: float | None = cap) -> torch.Tensor:
            if scale is not None:
                logits = logits * scale[1] if scale[0] else logits / scale[1]
            return logits if cap is None else torch.tanh(logits / cap) * cap

        yield step
