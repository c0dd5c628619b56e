"""A model made ready for packed batches: it is checked that no document sees another, and what would let it is refused.

`prepare_packed` is the one call that training and evaluation need. Without it, too, transformers keeps documents apart where
it can, by a mask of T x T that it makes from the position ids.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from qlora_core.attention import PER_DOCUMENT, attend_as_before, attend_per_document, base_of
from qlora_core.errors import DataError, ModelError

__all__ = ["at_rest", "check_packing", "guard", "prepare_packed"]

logger = logging.getLogger("qlora_core")

REMEDY = "set data.packing=false"
LEAK = 1e-5  # of the spread of logits: rounding, where the same products are made in another order


def prepare_packed(model: torch.nn.Module) -> None:
    """Make *model* ready for packed batches, or raise ModelError where its documents would see each other.

    Idempotent and cheap: a few forward passes over at most 54 tokens. Weights, mode and generators stay as they are.
    """
    guard(model)
    base = base_of(model)
    if attend_per_document(model) and not _refusal(model):
        return
    if base.config._attn_implementation.endswith(PER_DOCUMENT):
        attend_as_before(model)
    refusal = _refusal(model)
    if refusal is None:
        return
    explicit = _body(base).register_forward_pre_hook(_ExplicitMask(), with_kwargs=True)
    if _refusal(model):
        explicit.remove()
        raise refusal  # what is wrong with the model as transformers has it


def _refusal(model: torch.nn.Module) -> ModelError | None:
    try:
        check_packing(model)
    except ModelError as error:
        logger.debug("packing: %s", error)
        return error
    return None


class _ExplicitMask:
    """Adds the mask (B, 1, T, T) of a packed batch: for OPT, XGLM and others that make theirs without positions."""

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        positions = kwargs.get("position_ids")
        if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
            return None
        if not torch.is_tensor(positions) or positions.ndim != 2 or not _restarts(positions, None):
            return None
        document = (positions.diff(dim=1, prepend=positions[:, :1]) != 1).cumsum(dim=1)
        mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        if getattr(module.config, "_attn_implementation", None) == "eager":  # which adds it to the scores
            dtype = next(module.parameters()).dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return args, {**kwargs, "attention_mask": mask}


# What would let documents see each other


class _Guard:
    """Refuses packed batches that come with a mask or a cache, by which transformers would take a row for one document."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.names = list(inspect.signature(module.forward).parameters)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        positions, mask, use_cache = (given.get(name) for name in ("position_ids", "attention_mask", "use_cache"))
        if not torch.is_tensor(positions) or positions.ndim != 2 or positions.shape[1] < 2 or torch.compiler.is_compiling():
            return
        masked = torch.is_tensor(mask) and mask.ndim == 2
        if mask is not None and not masked:
            return  # a mask of its own kind says itself who sees whom
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        cached = bool(use_cache) or given.get("past_key_values") is not None
        if (masked or cached) and _restarts(positions, mask):
            wrong = " and ".join(["an attention_mask"] * masked + ["a cache"] * cached)
            raise DataError(
                f"a packed batch came with {wrong}, so that its documents would see each other; "
                "call the model with use_cache=False and without attention_mask, as Collator's batches do"
            )


def guard(model: torch.nn.Module) -> None:
    """Let *model* refuse packed batches that come with a mask or a cache, with a DataError. Idempotent.

    Costs one comparison of position ids, for batches with a mask or a cache only, and nothing per generated token.
    """
    body = _body(base_of(model))
    if not any(isinstance(hook, _Guard) for hook in body._forward_pre_hooks.values()):
        body.register_forward_pre_hook(_Guard(body), with_kwargs=True)


def _restarts(positions: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether positions (B, T) fall or stay within a row, from one token that is no padding to the next."""
    falls = positions[:, 1:] <= positions[:, :-1]
    if mask is not None:
        real = mask[:, -positions.shape[1] :].bool()
        falls = falls & real[:, 1:] & real[:, :-1]
    return bool(falls.any())


# Whether documents see each other


def check_packing(model: torch.nn.Module) -> None:
    """Raise ModelError if a document's logits in *model* depend on what it is packed with, or differ from those alone.

    Mostly the first difference is 0 to the bit. Where it is more than LEAK, since experts or int8 round by what else is in the
    batch, it is compared with that of a document beside another in the batch, and of one after another in its context.
    """
    base = base_of(model)
    vocabulary = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    document, *others = (torch.randint(vocabulary, (length,), generator=generator) for length in (11, 7, 7))
    with at_rest(model):
        alone = _logits(model, [document])[0]
        try:
            pairs, ahead = _packed(model, document, *others)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{type(base).__name__} takes no packed batches: {first[:200]}; {REMEDY}") from error
        if not alone.isfinite().all():
            return  # nothing to compare; training will say so
        leak = _distance(alone, *pairs)
        apart = _distance(alone, *((one, alone) for one in (ahead, *(pair[0] for pair in pairs))))
        most, far = LEAK, _noise(model)
        if not (leak <= most and apart <= far):  # not a number is no small difference
            batch, within = _rounding(model, alone, document, others)
            most, far = max(most, 3 * batch, min(far, 0.1 * within)), max(far, 3 * batch)
    logger.debug("packing: leak %.1e of at most %.1e, apart %.1e of at most %.1e", leak, most, apart, far)
    if not (leak <= most and apart <= far):
        leaks = not leak <= most
        what = "documents of a packed batch see each other" if leaks else "a packed document differs from one alone"
        by = leak if leaks else apart
        raise ModelError(f"{type(base).__name__}: {what} (logits differ by {by:.2g} of their spread); {REMEDY}")


def _distance(scale: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest root mean square difference of *pairs*, in units of the spread of *scale*; nan where one is."""
    differences = torch.stack([(a - b).square().mean().sqrt() for a, b in pairs])
    return float(differences.max() / scale.std().clamp(min=1e-12))  # max of torch passes nan on, that of Python does not


def _rounding(
    model: torch.nn.Module, alone: torch.Tensor, document: torch.Tensor, others: list[torch.Tensor]
) -> tuple[float, float]:
    """Return how far the logits of *document* move by what is beside it in the batch, and by what is before it in the row."""
    size = len(document)
    joined = [torch.cat([other, document]) for other in others]
    beside = [_logits(model, [document], [both[:size]])[0] for both in joined]
    within = [_logits(model, [both])[0, -size:] for both in joined]
    one, two = beside
    return max(_distance(alone, (one, two)), _distance(alone, (one, alone))), _distance(alone, (within[0], within[1]))


def _packed(
    model: torch.nn.Module, document: torch.Tensor, one: torch.Tensor, two: torch.Tensor
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Return pairs of the logits of *document*, packed after *one* and after *two*, and those of it before another.

    A row is packed by itself, and among others whose documents begin elsewhere: flash_attention_2 looks for documents in
    batches of one row only, and takes each row of a larger one for one document.
    """
    size = len(document)
    single = [_logits(model, [other, document])[0, -size:] for other in (one, two)]
    batches = [_logits(model, [document, a], [a, document], [b, document]) for a, b in ((one, two), (two, one))]
    among = [(batches[0][row, -size:], batches[1][row, -size:]) for row in (1, 2)]
    return [(single[0], single[1]), *among], batches[0][0, :size]


def _logits(model: torch.nn.Module, *rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits (B, T, V) float32 of *rows*, T tokens each; those of several documents are packed."""
    device = next(model.parameters()).device
    batch = {"input_ids": torch.stack([torch.cat(row) for row in rows]).to(device)}
    if any(len(row) > 1 for row in rows):
        positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
        batch["position_ids"] = torch.stack(positions).to(device)
    logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits[:, -batch["input_ids"].shape[1] :].float()  # prompt tuning puts some before


def _noise(model: torch.nn.Module) -> float:
    """Return the distance up to which rounding may explain a difference; a few times what real models show."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
    return 5e-2 if quantized or torch.bfloat16 in dtypes else 1e-2 if torch.float16 in dtypes else 1e-4


@contextlib.contextmanager
def at_rest(model: torch.nn.Module) -> Iterator[None]:
    """Put *model* in eval mode without gradients, and every module back in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _body(base: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return the part of *base* that makes masks; PEFT calls the forward of *base* itself past its hooks."""
    body = base.get_decoder()
    return body if isinstance(body, transformers.PreTrainedModel) else base.base_model
