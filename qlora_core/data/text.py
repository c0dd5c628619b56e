"""Raw text as samples: documents, split into pieces that lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_core.config import DataConfig
from qlora_core.data.encoder import Encoder
from qlora_core.data.samples import Sample
from qlora_core.data.specials import special_ids
from qlora_core.data.template import begin_ids
from qlora_core.errors import DataError

if TYPE_CHECKING:
    import transformers

__all__ = ["TextEncoder"]


class TextEncoder(Encoder):
    """Raw text: each document between the tokenizer's own begin and end tokens, split into pieces, none of it lost."""

    rows = 64  # pieces of a file, of 64 Ki characters each
    labels = False

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig, *, continuous: bool = False) -> None:
        super().__init__(tokenizer, data)
        self.continuous = continuous
        self.begin = np.array(begin_ids(tokenizer), dtype=np.int32)
        self.end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
        self.special = _special_table(tokenizer)
        self.rest: np.ndarray | None = None  # of the document that is open
        self.origin = ""

    @property
    def state(self) -> Any:
        """The open document's tokens that fill no piece yet, and where it began."""
        return None if self.rest is None else {"rest": self.rest.tolist(), "origin": self.origin}

    @state.setter
    def state(self, value: Any) -> None:
        self.rest = None if value is None else np.array(value["rest"], dtype=np.int32)
        self.origin = "" if value is None else value["origin"]

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield full pieces, and the shorter end of each document that another one follows."""
        texts = rows["text"]
        continues = rows.get("continues") or [False] * len(texts)
        origins = self.origins(rows, first)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{origins[index]}: text must be text (got {text!r:.60})")
        for ids, goes_on, origin in zip(_token_ids(self.tokenizer, texts), continues, origins, strict=True):
            if not goes_on:
                yield from self.finish()
                self.rest, self.origin = self.begin, origin
            elif self.rest is None:
                self.rest, self.origin = self.begin, origin
            yield from self._pieces(ids)

    def finish(self) -> Iterator[Sample]:
        """Yield the end of the open document; a token alone predicts nothing."""
        if self.rest is None:
            return
        yield from self._pieces(self.end)
        if len(self.rest) > 1:
            yield self._piece(self.rest)
        self.rest = None

    def _pieces(self, ids: np.ndarray) -> Iterator[Sample]:
        assert self.rest is not None
        length = self.data.sequence_length
        tokens = np.concatenate([self.rest, ids])
        full = len(tokens) // length * length
        for start in range(0, full, length):
            yield self._piece(tokens[start : start + length])
        self.rest = tokens[full:]

    def _piece(self, ids: np.ndarray) -> Sample:
        sample = Sample(ids, None, self.origin, len(ids))
        inner = ids[:-1] if len(self.end) and ids[-1] == self.end[0] else ids
        found = inner[self.special[inner]]
        if len(self.begin) and len(found) and ids[0] == self.begin[0]:
            found = found[1:]
        if len(found):
            sample.note("typed", repr(self.tokenizer.convert_ids_to_tokens(int(found[0]))))
        return sample


def _token_ids(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the ids (T,) int32 of each of *texts*, without special tokens around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from (np.asarray(ids, np.int32) for ids in encoded["input_ids"])
        return
    backend.no_padding()
    backend.no_truncation()
    for one in backend.encode_batch_fast(texts, add_special_tokens=False):  # without offsets, which nobody asks for
        yield np.asarray(one.ids, np.int32)


def _special_table(tokenizer: transformers.PreTrainedTokenizerBase) -> np.ndarray:
    """Return a table (vocabulary,) of bool: which ids are special tokens."""
    special = special_ids(tokenizer)
    table = np.zeros(max(len(tokenizer), max(special, default=0) + 1), bool)
    table[list(special)] = True
    return table
