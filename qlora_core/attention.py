"""Attention within each document of a packed batch: memory and time grow with the documents, not with the block's square."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_core.errors import ModelError

__all__ = ["PER_DOCUMENT", "Documents", "attend_as_before", "attend_per_document", "base_of"]

PER_DOCUMENT = "_per_document"  # what the name of an attention of transformers ends in where it is ours around another
ALIGNED = 64  # on CPUs documents are padded to multiples of it: bfloat16 kernels are compiled, and kept, for each length
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


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

    It does if every layer is causal attention, full or sliding, by transformers' `sdpa` or by another that is registered there
    with the masks of `sdpa` (as kernels may do), which then is called for each document. All other batches, and generation,
    are given to that attention as before.
    """
    base = base_of(model)
    config = base.config
    name = config._attn_implementation
    if name.endswith(PER_DOCUMENT):
        return True
    layers = set(getattr(config, "layer_types", None) or ())
    plain = config.get_text_config() is config and layers <= KNOWN_LAYERS and not getattr(config, "attention_chunk_size", None)
    masked_alike = ALL_MASK_ATTENTION_FUNCTIONS.get(name) is sdpa_mask
    if not masked_alike or not plain or not base._can_set_attn_implementation():
        return False
    inner = ALL_ATTENTION_FUNCTIONS[name]
    transformers.AttentionInterface.register(name + PER_DOCUMENT, functools.partial(_attention, inner))
    AttentionMaskInterface.register(name + PER_DOCUMENT, _mask)
    base.set_attn_implementation(name + PER_DOCUMENT)
    return True


def attend_as_before(model: torch.nn.Module) -> None:
    """Undo `attend_per_document`."""
    base = base_of(model)
    base.set_attn_implementation(base.config._attn_implementation.removesuffix(PER_DOCUMENT))


def _attention(
    inner: Callable[..., tuple[torch.Tensor, Any]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Documents | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Return the output (B, T, heads, d_value) of attention; query (B, heads, T, d), key and value (B, kv_heads, T, d)."""
    if not isinstance(attention_mask, Documents):
        return inner(module, query, key, value, attention_mask, **kwargs)
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
            outputs.append(inner(module, *qkv, mask, **kwargs)[0][:, :size])
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


def base_of(model: torch.nn.Module) -> transformers.PreTrainedModel:
    """Return the transformers model in *model*, below what adapters wrap around it."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            return module
    raise ModelError(f"{type(model).__name__} holds no transformers model, so packing can't be checked; set data.packing=false")
