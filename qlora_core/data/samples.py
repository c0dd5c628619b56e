"""Samples: what is packed or padded, with what is wrong about each beside it; kept in Arrow on disk, made once.

A sample is a chat, a prompt with its completion, or a piece of a text of at most `sequence_length` tokens. Nothing is judged
here: a row that can't be used becomes a sample without tokens that says why, and the gate decides.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from qlora_core.data.arrow import cached_batches
from qlora_core.data.mask import IGNORED

if TYPE_CHECKING:
    import datasets
    import transformers

    from qlora_core.data.encoder import Encoder

__all__ = ["Sample", "samples_of", "table_of"]


@dataclass
class Sample:
    """One sample: `ids` (T,) int32 and `labels` (T,) int32, IGNORED where not supervised; None where every token is.

    `length` is the number of tokens before anything was cut; `turns` counts supervised turns and `ended` those of them
    whose end-of-turn token is supervised.
    """

    ids: np.ndarray
    labels: np.ndarray | None = None
    origin: str = ""
    length: int = 0
    turns: int = 0
    ended: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def supervised(self) -> int:
        """Tokens that the model learns to predict; never the first, which nothing predicts."""
        return max(0, len(self.ids) - 1) if self.labels is None else int((self.labels[1:] != IGNORED).sum())

    def note(self, code: str, detail: str) -> None:
        """Add a finding."""
        self.problems.append(f"{code}: {detail}")


def samples_of(examples: datasets.Dataset, encoder: Encoder, *, labelled: bool = False) -> datasets.Dataset:
    """Return the samples of *examples* as *encoder* makes them, from the cache where nothing has changed.

    Columns: those of `table_of`. With *labelled* there are labels even where every token is supervised.
    """
    key = f"samples {_code()} {examples._fingerprint} {_digest(encoder.tokenizer)} {encoder.settings} {labelled}"
    labelled = labelled or encoder.labels

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        for rows in examples.iter(batch_size=encoder.rows):
            yield table_of(encoder.encode(rows, first), labelled)
            first += len(next(iter(rows.values())))
        yield table_of(encoder.finish(), labelled)

    return cached_batches(batches, _features(labelled), key)


def table_of(samples: Iterable[Sample], labelled: bool) -> pa.RecordBatch:
    """Return *samples* in Arrow: input_ids, labels (if *labelled*), origin, problems, length, supervised, turns, ended, digest.

    `digest` is a 64-bit hash of ids and labels, by which rows that repeat each other are found.
    """
    made = list(samples)
    columns: dict[str, pa.Array] = {"input_ids": _lists([sample.ids for sample in made])}
    if labelled:
        columns["labels"] = _lists([_labels(sample) for sample in made])
    columns["origin"] = pa.array([sample.origin for sample in made], pa.string())
    columns["problems"] = pa.array([sample.problems for sample in made], pa.list_(pa.string()))
    for name in ("length", "supervised", "turns", "ended"):
        columns[name] = pa.array([getattr(sample, name) for sample in made], pa.int32())
    columns["digest"] = pa.array([_hash(sample) for sample in made], pa.int64())
    return pa.record_batch(columns)


def _labels(sample: Sample) -> np.ndarray:
    return sample.ids if sample.labels is None else sample.labels


def _hash(sample: Sample) -> int:
    digest = xxhash.xxh3_64(sample.ids.tobytes())
    if sample.labels is not None and not np.array_equal(sample.labels, sample.ids):
        digest.update(sample.labels.tobytes())
    return digest.intdigest() - 2**63


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate(arrays).astype(np.int32, copy=False) if arrays else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _features(labelled: bool) -> dict[str, Any]:
    import datasets

    ids, text, number = datasets.List(datasets.Value("int32")), datasets.Value("string"), datasets.Value("int32")
    named = {"input_ids": ids, **({"labels": ids} if labelled else {}), "origin": text, "problems": datasets.List(text)}
    return {
        **named,
        "length": number,
        "supervised": number,
        "turns": number,
        "ended": number,
        "digest": datasets.Value("int64"),
    }


@functools.cache
def _code() -> str:
    """Return a digest of what makes samples: the modules and templates beside this one, and the libraries that they call."""
    libraries = [f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2")]
    digest = hashlib.sha256("\n".join(libraries).encode())
    folder = Path(__file__).parent
    for path in sorted((*folder.glob("*.py"), *folder.glob("templates/*.jinja"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    settings = "" if backend is not None else sorted(map(repr, tokenizer.init_kwargs.items()))
    return hashlib.sha256(f"{content} {tokenizer.special_tokens_map} {settings}".encode()).hexdigest()
