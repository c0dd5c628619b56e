"""From examples to blocks: encode, judge, hold out, pack; the same way for every dataset source. Reads top to bottom."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Literal

import numpy as np

from qlora_core.calls import answered, calling
from qlora_core.config import DataConfig
from qlora_core.data import gate
from qlora_core.data.portions import Portion, apart, held_out, weighted
from qlora_core.errors import ConfigError, DataError, Problem
from qlora_core.libraries import import_libraries
from qlora_core.parts import Weighted, mixed

if TYPE_CHECKING:
    import datasets
    import transformers

    from qlora_core.data.blocks import Blocks
    from qlora_core.data.encoder import Encoder
    from qlora_core.data.stream import StreamedBlocks
    from qlora_core.data.template import ChatTemplate
    from qlora_core.providers import DatasetSource

__all__ = ["Encoded", "encode", "encode_split"]

logger = logging.getLogger("qlora_core")

SplitName = Literal["train", "eval"]


@dataclass(frozen=True)
class Encoded:
    """Blocks to train and to evaluate on, and what is known about the data."""

    train: Blocks | StreamedBlocks
    eval: Blocks | None
    fingerprint: str
    """SHA-256 of the digests of all samples in order; of a stream, of the first `gate_rows` rows."""
    template: ChatTemplate | None = None
    """The chat template in which the samples are rendered; None where there is none."""
    findings: dict[str, gate.Findings] = field(default_factory=dict)
    """What the gate found, by split."""
    rows: dict[str, int] = field(default_factory=dict)
    """Samples before any was left out, by split; without a separate "eval" split they count as "train"."""
    left_out: int = 0
    """Samples of these that the gate, or deduplication, took away."""
    encoders: tuple[Encoder, ...] = ()
    """What made the training samples of each source."""
    checked: datasets.Dataset | None = None
    """Of a stream, the samples that the gate has seen."""

    @property
    def train_tokens(self) -> int:
        """Tokens in one epoch; 0 for a stream, which has no end that is known."""
        return getattr(self.train, "tokens", 0)

    @property
    def eval_tokens(self) -> int:
        """Tokens held out."""
        return self.eval.tokens if self.eval is not None else 0


def encode(
    sources: DatasetSource | Sequence[tuple[DatasetSource, float]],
    tokenizer: transformers.PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    seed: int = 0,
    day: date | None = None,
) -> Encoded:
    """Return the blocks that *sources*, one or several with weights, give; raise DataError for what the gate refuses.

    Without a separate evaluation split `eval_fraction` of each source's samples are held out, at least one: the end of a text,
    and of rows some that are spread evenly over all, since files are often sorted.
    *seed* shuffles a stream; blocks that are stored are shuffled in training. *day*, by default today, is that of the samples
    to take from the cache where a chat template writes the date: a run that is resumed goes on with those of its first day.
    """
    mix = mixed(sources)
    encoders = _Encoders(tokenizer, data, day)
    if data.streaming:
        return _streamed(mix, encoders, seed)
    train = [_read(source, "train", encoders) for source, _ in mix]
    evaluation = [_read(source, "eval", encoders) for source, _ in mix]
    labelled = any(read is not None and read.encoder.labels for read in (*train, *evaluation))
    judge = _Judge(data, labelled)
    parts: dict[SplitName, list[Portion]] = {"train": [], "eval": []}
    for (source, _), first, second in zip(mix, train, evaluation, strict=True):
        if first is None:
            raise DataError(f"dataset: {source.name!r} gives no examples to train on")
        ours = judge.read(first)
        if second is not None:
            parts["eval"].append(judge.read(second))
        elif data.eval_fraction > 0:
            ours, theirs = held_out(ours, data, source.name, continuous=first.encoder.continuous)
            parts["eval"].append(theirs)
        parts["train"].append(ours)
    if parts["eval"]:
        digests = np.concatenate([part.digests for part in parts["eval"]])
        parts["train"] = [apart(part, digests, data, judge.findings["train"]) for part in parts["train"]]
    left_out = judge.left_out(part for split in parts.values() for part in split)
    judge.tell()
    parts["train"] = [weighted(part, weight) for part, (_, weight) in zip(parts["train"], mix, strict=True)]
    held = _blocks(parts["eval"], data) if parts["eval"] else None
    made = tuple(read.encoder for read in train if read is not None)
    blocks, digest = _blocks(parts["train"], data), _fingerprint(parts.values())
    return Encoded(blocks, held, digest, encoders.template, judge.findings, judge.rows, left_out, made)


def encode_split(
    source: DatasetSource, split: SplitName, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig
) -> Blocks | None:
    """Return the blocks of *split*, or None where *source* has no such split; raise DataError for what the gate refuses."""
    read = _read(source, split, _Encoders(tokenizer, data))
    if read is None:
        return None
    judge = _Judge(data, read.encoder.labels)
    portion = judge.read(read)
    judge.tell()
    return _blocks([portion], data)


class _Judge:
    """Lets the gate judge the samples of each source, and keeps what it found; rows that repeat are found over all sources."""

    def __init__(self, data: DataConfig, labelled: bool) -> None:
        self.data = data
        self.labelled = labelled
        self.findings: dict[str, gate.Findings] = {}
        self.rows: dict[str, int] = {}
        self._seen: dict[str, np.ndarray] = {}

    def read(self, read: _Read) -> Portion:
        """Return the samples of *read* that can be used; raise DataError for what stops a run."""
        from qlora_core.data.samples import samples_of

        return self(samples_of(read.examples, read.encoder, labelled=self.labelled), read.split, read.source.name)

    def __call__(self, samples: datasets.Dataset, split: str, source: str) -> Portion:
        """Return which of *samples* can be used."""
        seen = self._seen.get(split, np.empty(0, np.int64))
        findings, kept = gate.check(samples, split, source, self.data, seen)
        portion = Portion(samples, kept)
        self._seen[split] = np.concatenate([seen, portion.digests])
        self.findings.setdefault(split, gate.Findings()).merge(findings)
        self.rows[split] = self.rows.get(split, 0) + len(samples)
        return portion

    def left_out(self, used: Iterable[Portion]) -> int:
        """Return how many of the samples that were read are not among those *used*."""
        return sum(self.rows.values()) - sum(len(portion.rows) for portion in used)

    def tell(self) -> None:
        """Log a warning for each finding."""
        for split, findings in self.findings.items():
            gate.tell(findings, split, self.data)


class _Encoders:
    """Makes the encoder of each source; the chat template is chosen once, where one is needed."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig, day: date | None = None) -> None:
        import_libraries()
        self.tokenizer = tokenizer
        self.data = data
        self.day = day or date.today()
        self.template: ChatTemplate | None = None

    def make(self, columns: Sequence[str], source: str) -> Encoder:
        from qlora_core.data.encoders import encoder_for, form_of
        from qlora_core.data.template import ChatTemplate

        if form_of(columns, source) in ("pairs", "chats") and self.template is None:
            self.template = ChatTemplate.choose(self.tokenizer, self.data.template)
            if self.template is not None:
                self._warn(self.template)
        return encoder_for(columns, source, self.tokenizer, self.template, self.data, self.day)

    def _warn(self, template: ChatTemplate) -> None:
        missing = template.missing_tokens(self.tokenizer)
        if "eos_token" in missing:
            logger.warning("data.template: %s ends answers with EOS, and the tokenizer has none; use chatml", template.name)
        elif missing:
            logger.warning(
                "data.template: %s writes %s, no special tokens of the model's; add them with tokens.add, or use plain",
                template.name,
                ", ".join(missing),
            )


@dataclass(frozen=True)
class _Read:
    """One split of one source."""

    source: DatasetSource
    split: SplitName
    examples: datasets.Dataset
    encoder: Encoder


def _read(source: DatasetSource, split: SplitName, encoders: _Encoders) -> _Read | None:
    import_libraries()
    import datasets

    with calling(source, f"examples({split!r})"):
        kinds, words = (datasets.Dataset, type(None)), "a datasets.Dataset or None"
        examples = answered(source, "examples", source.examples(split), kinds, words)
    if examples is None:
        return None
    return _Read(source, split, examples, encoders.make(examples.column_names, source.name))


def _streamed(mix: Sequence[Weighted], encoders: _Encoders, seed: int) -> Encoded:
    """Return endless blocks of what *mix* gives, once the gate has seen the first rows of each source."""
    import datasets

    from qlora_core.data.stream import Stream, StreamedBlocks, first_rows

    data = encoders.data
    evaluation = [read for source, _ in mix if (read := _read(source, "eval", encoders)) is not None]
    if not evaluation and data.eval_fraction > 0:
        what = "a stream has no end to hold out; set it to 0, or give the dataset evaluation data of its own"
        raise ConfigError([Problem(("data", "eval_fraction"), what)])
    streams = []
    for source, weight in mix:
        with calling(source, "stream"):
            first = next(iter(source.stream()), None)
        if first is None:
            raise DataError(f"dataset: {source.name!r} gives no rows to train on")
        streams.append(Stream(source, encoders.make(list(first[0]), source.name), weight))
    encoded = [*(stream.encoder for stream in streams), *(read.encoder for read in evaluation)]
    labelled = any(encoder.labels for encoder in encoded)
    judge, digest, checked = _Judge(data, labelled), hashlib.sha256(), []
    for stream in streams:
        samples, mark = first_rows(stream, data.gate_rows, labelled=labelled)
        checked.append(judge(samples, "train", stream.source.name))
        digest.update(mark.encode())
    judged = [judge.read(read) for read in evaluation]
    if judged:
        digests = np.concatenate([part.digests for part in judged])
        for part in checked:
            apart(part, digests, data, judge.findings["train"])
    judge.tell()
    blocks = StreamedBlocks(streams, data, labelled=labelled, seed=seed)
    return Encoded(
        blocks,
        _blocks(judged, data) if judged else None,
        digest.hexdigest(),
        encoders.template,
        judge.findings,
        judge.rows,
        judge.left_out((*checked, *judged)),
        tuple(stream.encoder for stream in streams),
        datasets.concatenate_datasets([samples for samples, _ in checked]),
    )


def _blocks(parts: Sequence[Portion], data: DataConfig) -> Blocks:
    """Return the chosen samples of all *parts* in blocks, packed or one each."""
    import datasets

    from qlora_core.data.blocks import Blocks
    from qlora_core.data.pack import pack

    samples = parts[0][0] if len(parts) == 1 else datasets.concatenate_datasets([part for part, _ in parts])
    starts = np.cumsum([0, *(len(part) for part, _ in parts[:-1])])
    rows = np.concatenate([chosen + start for (_, chosen), start in zip(parts, starts, strict=True)])
    if not data.packing:
        return Blocks(samples, (np.arange(len(rows) + 1), rows), packed=False)
    lengths = np.concatenate([gate.lengths(part)[chosen] for part, chosen in parts])
    offsets, indices = pack(lengths, data.sequence_length)
    return Blocks(samples, (offsets, rows[indices]), packed=True)


def _fingerprint(splits: Iterable[Sequence[Portion]]) -> str:
    digest = hashlib.sha256()
    for parts in splits:
        for part in parts:
            digest.update(part.digests.tobytes())
        digest.update(b"|")
    return digest.hexdigest()
