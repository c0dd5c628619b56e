"""Which ids of a tokenizer are special tokens: they stand for no text, but begin and end it. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

__all__ = ["special_ids", "special_tokens"]


def special_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the special tokens of *tokenizer*: those added as special, and the named ones (BOS, EOS, ...)."""
    added = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = (index for index in tokenizer.all_special_ids if index is not None)  # None: named, but in no vocabulary
    return frozenset(added.union(map(int, named)))


def special_tokens(tokenizer: transformers.PreTrainedTokenizerBase) -> frozenset[str]:
    """Return how the special tokens of *tokenizer* are written."""
    return frozenset(map(str, tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))))
