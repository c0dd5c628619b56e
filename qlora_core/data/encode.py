"""Turn examples into blocks of token ids, the same way for every dataset source. Memory stays constant: Arrow on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qlora_core.calls import answered, calling
from qlora_core.config import DataConfig
from qlora_core.errors import DataError
from qlora_core.libraries import import_libraries

if TYPE_CHECKING:
    import datasets
    import transformers

    from qlora_core.providers import DatasetSource

__all__ = ["Encoded", "encode", "encode_split"]

ROWS = 64  # examples per call of the tokenizer, which works on a batch in parallel


@dataclass(frozen=True)
class Encoded:
    """Blocks to train and to evaluate on: columns `input_ids` and, where some tokens are not supervised, `labels`."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    fingerprint: str
    """SHA-256 of all token ids and labels, in order."""

    @property
    def train_tokens(self) -> int:
        """Tokens in one epoch."""
        return _tokens(self.train)

    @property
    def eval_tokens(self) -> int:
        """Tokens held out."""
        return _tokens(self.eval) if self.eval is not None else 0


def encode(source: DatasetSource, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig) -> Encoded:
    """Return the blocks that *source* gives; raise DataError where there is nothing to train or to evaluate on.

    Without a separate evaluation split the last `eval_fraction` of the blocks is held out, at least one.
    """
    train = encode_split(source, "train", tokenizer, data)
    if train is None:
        raise DataError(f"dataset: {source.name!r} gives no examples to train on")
    evaluation = encode_split(source, "eval", tokenizer, data, keep_rest=True)
    fingerprint = _digest(train, evaluation)
    if evaluation is None and data.eval_fraction > 0:
        held_out = max(1, round(len(train) * data.eval_fraction))
        if held_out >= len(train):
            blocks = f"{len(train)} block{'s' if len(train) > 1 else ''} of {data.sequence_length} tokens"
            raise DataError(
                f"data.eval_fraction: the data gives {blocks}, too few to hold any out; "
                "set data.eval_fraction=0, a smaller data.sequence_length, or add data"
            )
        evaluation = train.select(range(len(train) - held_out, len(train)))
        train = train.select(range(len(train) - held_out))
    return Encoded(train, evaluation, fingerprint)


def encode_split(
    source: DatasetSource,
    split: Literal["train", "eval"],
    tokenizer: transformers.PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    keep_rest: bool = False,
) -> datasets.Dataset | None:
    """Return the blocks of *split*, or None where *source* has no such split; raise DataError where it has no tokens.

    With packing, blocks have exactly `sequence_length` tokens and a shorter rest is dropped unless *keep_rest*; without,
    each document ends in a shorter block of its own.
    """
    import_libraries()
    import datasets

    from qlora_core.data.arrow import cached_dataset

    with calling(source, f"examples({split!r})"):
        kinds, words = (datasets.Dataset, type(None)), "a datasets.Dataset or None"
        examples = answered(source, "examples", source.examples(split), kinds, words)
    if examples is None:
        return None
    if "input_ids" in examples.column_names:
        blocks = _as_blocks(examples, data)
    elif "text" in examples.column_names:
        settings = f"{split} {data.sequence_length} {data.packing} {keep_rest}"
        key = f"{examples._fingerprint} {_tokenizer_digest(tokenizer)} {settings}"
        features = {"input_ids": datasets.List(datasets.Value("int32"))}
        arguments = {"examples": examples, "tokenizer": tokenizer, "data": data, "keep_rest": keep_rest}
        blocks = cached_dataset(_text_blocks, features, key, **arguments)
    else:
        raise DataError(
            f"dataset: {source.name!r} gives rows with the columns {', '.join(examples.column_names)}; "
            "rows must have text, or input_ids with optional labels"
        )
    if len(blocks) == 0:
        tokens = sum(len(ids) for ids, _ in _documents(examples, tokenizer)) if "text" in examples.column_names else 0
        raise DataError(
            f"dataset: {source.name!r} gives {tokens} tokens, fewer than one block of {data.sequence_length}; "
            f"add text, or set data.sequence_length to at most {max(2, tokens)}"
            if tokens
            else f"dataset: {source.name!r} gives no tokens; the data is empty"
        )
    return blocks


def _text_blocks(
    examples: datasets.Dataset,
    tokenizer: transformers.PreTrainedTokenizerBase,
    data: DataConfig,
    keep_rest: bool,
) -> Iterator[dict[str, Any]]:
    length = data.sequence_length
    buffer = np.empty(0, dtype=np.int32)
    for ids, ends in _documents(examples, tokenizer):
        buffer = np.concatenate([buffer, ids])
        full = len(buffer) // length * length
        for start in range(0, full, length):
            yield {"input_ids": buffer[start : start + length]}
        buffer = buffer[full:]
        if ends and not data.packing:
            if len(buffer) > 1:  # one token alone predicts nothing
                yield {"input_ids": buffer}
            buffer = buffer[:0]
    if keep_rest and len(buffer) > 1:
        yield {"input_ids": buffer}


def _documents(
    examples: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield runs of token ids, and whether a document ends there, with the tokens that stand around each document.

    A document begins with what the tokenizer puts before a text (a BOS token, or nothing) and ends with its EOS token.
    """
    probe = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    begin = np.array(probe[: len(probe) - len(bare)] if probe[-len(bare) :] == bare else probe[:0], dtype=np.int32)
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
    started = False
    for rows in examples.iter(batch_size=ROWS):
        texts = rows["text"]
        continues = rows.get("continues", [False] * len(texts))
        for ids, goes_on in zip(_tokenize(tokenizer, texts), continues, strict=True):
            if not goes_on:
                if started:
                    yield end, True
                yield begin, False
            started = True
            yield ids, False
    if started:
        yield end, True


def _tokenize(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _as_blocks(examples: datasets.Dataset, data: DataConfig) -> datasets.Dataset:
    columns = [name for name in ("input_ids", "labels") if name in examples.column_names]
    for index, row in enumerate(examples.select_columns(columns)):
        if len(row["input_ids"]) > data.sequence_length:
            raise DataError(
                f"dataset: row {index} has {len(row['input_ids'])} tokens, more than data.sequence_length "
                f"{data.sequence_length}; raise it, or cut the rows"
            )
        if not row["input_ids"]:
            raise DataError(f"dataset: row {index} has no tokens; leave it out")
        if "labels" in row and len(row["labels"]) != len(row["input_ids"]):
            raise DataError(f"dataset: row {index} has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels")
    return examples.select_columns(columns)


def _tokens(blocks: datasets.Dataset) -> int:
    return sum(len(ids) for rows in blocks.iter(batch_size=1000) for ids in rows["input_ids"])


def _tokenizer_digest(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{content} {tokenizer.eos_token}".encode()).hexdigest()


def _digest(*splits: datasets.Dataset | None) -> str:
    digest = hashlib.sha256()
    for blocks in splits:
        for rows in blocks.with_format("arrow").iter(batch_size=1000) if blocks is not None else ():
            for column in rows.column_names:
                lists = rows.column(column).combine_chunks()
                digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int32).tobytes())
                digest.update(lists.flatten().to_numpy().astype(np.int64).tobytes())
        digest.update(b"|")
    return digest.hexdigest()
