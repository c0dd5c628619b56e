"""Attention over packed batches: within each document, and nowhere else, or not at all.

`prepare_packed` is the one call that training and evaluation need. Without it, too, transformers keeps documents apart, by a
mask of T x T that it makes from the position ids; with `sdpa_per_document` no such mask exists, and memory and time grow
with the documents' lengths, not with the square of the block's.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_core.errors import DataError, ModelError

__all__ = ["PER_DOCUMENT", "Documents", "attend_per_document", "check_packing", "guard", "prepare_packed"]

logger = logging.getLogger("qlora_core")

PER_DOCUMENT = "sdpa_per_document"  # the name of our attention among those of transformers
REMEDY = "set data.packing=false"
ALIGNED = 64  # on CPUs documents are padded to multiples of it: bfloat16 kernels are compiled, and kept, for each length
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def prepare_packed(model: torch.nn.Module) -> None:
    """Make *model* ready for packed batches, or raise ModelError where its documents would see each other.

    Idempotent and cheap: a few forward passes over some 30 tokens. Weights, mode and generators stay as they are.
    """
    guard(model)
    base = _base(model)
    if attend_per_document(model) and not _refusal(model):
        return
    if base.config._attn_implementation == PER_DOCUMENT:
        base.set_attn_implementation("sdpa")
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


# Attention within documents


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a packed batch. Takes the place of a mask on the way through the layers.

    That way it is there when gradient checkpointing runs a layer again, and gone when the forward pass is.
    """

    rows: tuple[tuple[tuple[int, int], ...], ...]
    """Start and end of each document, for each row; they follow upon each other from 0 to T."""
    window: int | None
    """How many tokens a token sees, itself included; None: all before it in its document."""

    def mask(self, size: int, rest: int, device: torch.device) -> torch.Tensor | None:
        """Return the mask (T, T) bool of a document of *size* tokens and *rest* after it; None where causality is all."""
        if self.window is None or size <= self.window:
            return None
        ones = torch.ones(size + rest, size + rest, dtype=torch.bool, device=device)
        return ones.tril().triu(1 - self.window)


def attend_per_document(model: torch.nn.Module) -> bool:
    """Let *model* attend within each document of a packed batch; return whether it does.

    It does if it attends by transformers' `sdpa` and every layer is causal attention, full or sliding. All other batches, and
    generation, go through `sdpa` as before.
    """
    base = _base(model)
    config = base.config
    if config._attn_implementation == PER_DOCUMENT:
        return True
    layers = set(getattr(config, "layer_types", None) or ())
    plain = config.get_text_config() is config and layers <= KNOWN_LAYERS and not getattr(config, "attention_chunk_size", None)
    if config._attn_implementation != "sdpa" or not plain or not base._can_set_attn_implementation():
        return False
    transformers.AttentionInterface.register(PER_DOCUMENT, _attention)
    AttentionMaskInterface.register(PER_DOCUMENT, _mask)
    base.set_attn_implementation(PER_DOCUMENT)
    return True


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Documents | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the output (B, T, heads, d_value) of attention; query (B, heads, T, d), key and value (B, kv_heads, T, d)."""
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if kwargs.get("position_bias") is not None:
        raise ValueError("a position bias over the whole block can't be added per document")
    step = ALIGNED if query.device.type == "cpu" else 1
    outputs = []
    # split, not slices: the gradient of a slice is as large as what it was cut from
    for documents, *row in zip(attention_mask.rows, *(torch.split(tensor, 1) for tensor in (query, key, value)), strict=True):
        sizes = [end - start for start, end in documents]
        for size, *qkv in zip(sizes, *(torch.split(tensor, sizes, dim=2) for tensor in row), strict=True):
            rest = -size % step
            if rest:  # no token sees what comes after it, so what stands there does not matter
                qkv = [F.pad(tensor, (0, 0, 0, rest)) for tensor in qkv]
            mask = attention_mask.mask(size, rest, query.device)
            outputs.append(sdpa_attention_forward(module, *qkv, mask, **kwargs)[0][:, :size])
    output = torch.cat(outputs, dim=1)  # (1, B * T, heads, d_value): rows follow upon each other, too
    return output.view(query.shape[0], query.shape[2], *output.shape[2:]), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | Documents | None:
    """Return Documents for a packed batch, and what `sdpa_mask` returns for any other."""
    square = q_length == kv_length and not torch.is_tensor(q_offset) and q_offset == kv_offset == 0
    # transformers forbids the skip wherever more than causality is asked for, packs among it
    more = square and q_length > 1 and attention_mask is None and not allow_is_causal_skip and not use_vmap
    if more and mask_function is not None and not torch.compiler.is_compiling():
        documents = _documents(mask_function, batch_size, q_length, local_size, torch.device(device))
        if documents is not None:
            return documents
    given = {} if mask_function is None else {"mask_function": mask_function}
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **given,
        **kwargs,
    )


def _documents(
    sees: Callable[..., torch.Tensor], batch_size: int, length: int, window: int | None, device: torch.device
) -> Documents | None:
    """Return where the documents lie by whose mask *sees*, or None unless it is that of several causal documents.

    `sees(row, head, query, key)` says for index tensors whether a query sees a key. Asked only for neighbours and for the ends
    of what each query should see, so in time and memory that grow with T.
    """
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros(1, 1, dtype=torch.int64, device=device)
    query = torch.arange(length, device=device)[None]
    shape = batch_size, length
    starts = torch.ones(shape, dtype=torch.bool, device=device)
    starts[:, 1:] = ~sees(row, head, query[:, 1:], query[:, :-1])
    first = (query * starts).cummax(dim=1).values
    if window is not None:
        first = torch.maximum(first, query - (window - 1))
    before = (first - 1).clamp(min=0)
    right = sees(row, head, query, first) & sees(row, head, query, query).expand(shape)
    right = right & (~sees(row, head, query, before) | (first == 0))
    ahead = sees(row, head, query[:, :-1], query[:, 1:])
    if bool(ahead.any() | ~right.all() | ~starts[:, 1:].any()):
        return None
    rows = []
    for marks in starts.tolist():
        begins = [index for index, mark in enumerate(marks) if mark]
        rows.append(tuple(zip(begins, [*begins[1:], length], strict=True)))
    return Documents(tuple(rows), window)


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
    body = _body(_base(model))
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

    Mostly the first difference is 0 to the bit. Where it is not, since experts or int8 round by what else is in the batch, it
    is compared with that of a document beside another in the batch, and with that of one after another in its context.
    """
    base = _base(model)
    vocabulary = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    document, *others = (torch.randint(vocabulary, (length,), generator=generator) for length in (19, 13, 13))
    with _at_rest(model):
        alone = _logits(model, [document])
        joined = [torch.cat([other, document]) for other in others]
        beside = [_logits(model, [document], [both[: len(document)]]) for both in joined]
        within = [_logits(model, [both])[-len(document) :] for both in joined]
        try:
            packed = [_logits(model, [other, document]) for other in others]
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{type(base).__name__} takes no packed batches: {first[:200]}; {REMEDY}") from error
    if not alone.isfinite().all():
        return  # nothing to compare; training will say so
    spread = alone.std().clamp(min=1e-12)

    def differ(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().mean().sqrt() / spread)

    batch = 3 * max(differ(*beside), differ(beside[0], alone))
    leak, most = differ(*packed), max(1e-5, batch, min(_noise(model), 0.1 * differ(*within)))
    apart, far = differ(packed[0], alone), max(batch, _noise(model))
    logger.debug("packing: leak %.1e of at most %.1e, apart %.1e of at most %.1e", leak, most, apart, far)
    if leak > most or apart > far:
        what = "documents of a packed batch see each other" if leak > most else "a packed document differs from one alone"
        size = leak if leak > most else apart
        raise ModelError(f"{type(base).__name__}: {what} (logits differ by {size:.2g} of their spread); {REMEDY}")


def _logits(model: torch.nn.Module, *rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits (T, V) float32 of the last document of the first of *rows*; rows of several documents are packed."""
    device = next(model.parameters()).device
    batch = {"input_ids": torch.stack([torch.cat(row) for row in rows]).to(device)}
    if any(len(row) > 1 for row in rows):
        positions = [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
        batch["position_ids"] = torch.stack(positions).to(device)
    logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits[0, -len(rows[0][-1]) :].float()


def _noise(model: torch.nn.Module) -> float:
    """Return the distance up to which rounding may explain a difference; a few times what real models show."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
    return 5e-2 if quantized or torch.bfloat16 in dtypes else 1e-2 if torch.float16 in dtypes else 1e-4


@contextlib.contextmanager
def _at_rest(model: torch.nn.Module) -> Iterator[None]:
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


def _base(model: torch.nn.Module) -> transformers.PreTrainedModel:
    """Return the transformers model in *model*, below what adapters wrap around it."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            return module
    raise ModelError(f"{type(model).__name__} holds no transformers model, so packing can't be checked; {REMEDY}")
