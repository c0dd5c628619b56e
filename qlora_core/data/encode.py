"""From examples to blocks: encode, judge, hold out, pack; the same way for every dataset source. Reads top to bottom."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from qlora_core.calls import answered, calling
from qlora_core.config import DataConfig
from qlora_core.data import gate
from qlora_core.errors import ConfigError, DataError, Problem
from qlora_core.libraries import import_libraries
from qlora_core.parts import Weighted

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
) -> Encoded:
    """Return the blocks that *sources*, one or several with weights, give; raise DataError for what the gate refuses.

    Without a separate evaluation split `eval_fraction` of each source's samples are held out, at least one: the end of a text,
    and of rows some that are spread evenly over all, since files are often sorted.
    *seed* shuffles a stream; blocks that are stored are shuffled in training.
    """
    mix = _mix(sources)
    encoders = _Encoders(tokenizer, data)
    if data.streaming:
        return _streamed(mix, encoders, seed)
    train = [_read(source, "train", encoders) for source, _ in mix]
    evaluation = [_read(source, "eval", encoders) for source, _ in mix]
    labelled = any(read is not None and read.encoder.labels for read in (*train, *evaluation))
    chosen: dict[SplitName, list[tuple[datasets.Dataset, np.ndarray]]] = {"train": [], "eval": []}
    found: dict[str, gate.Findings] = {}
    rows: dict[str, int] = {}
    used = 0
    for (source, weight), first, second in zip(mix, train, evaluation, strict=True):
        if first is None:
            raise DataError(f"dataset: {source.name!r} gives no examples to train on")
        ours = _judged(first, labelled, found, rows)
        theirs = _judged(second, labelled, found, rows) if second is not None else None
        if theirs is None and data.eval_fraction > 0:
            ours, theirs = _held_out(ours, first, data)
        if theirs is not None:
            ours = _apart(ours, theirs, data, found)
            chosen["eval"].append(theirs)
            used += len(theirs[1])
        used += len(ours[1])
        chosen["train"].append((ours[0], _weighted(ours[1], weight)))
    for split, findings in found.items():
        gate.tell(findings, split, data)
    blocks = {split: _blocks(parts, data) for split, parts in chosen.items() if parts}
    digest = _fingerprint(chosen.values())
    made = tuple(read.encoder for read in train if read is not None)
    return Encoded(blocks["train"], blocks.get("eval"), digest, encoders.template, found, rows, sum(rows.values()) - used, made)


def encode_split(
    source: DatasetSource, split: SplitName, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig
) -> Blocks | None:
    """Return the blocks of *split*, or None where *source* has no such split; raise DataError for what the gate refuses."""
    read = _read(source, split, _Encoders(tokenizer, data))
    if read is None:
        return None
    found: dict[str, gate.Findings] = {}
    chosen = _judged(read, read.encoder.labels, found, {})
    gate.tell(found[split], split, data)
    return _blocks([chosen], data)


class _Encoders:
    """Makes the encoder of each source; the chat template is chosen once, where one is needed."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig) -> None:
        import_libraries()
        self.tokenizer = tokenizer
        self.data = data
        self.template: ChatTemplate | None = None

    def make(self, columns: Sequence[str], source: str) -> Encoder:
        from qlora_core.data.encoders import encoder_for, form_of
        from qlora_core.data.template import ChatTemplate

        if form_of(columns, source) in ("pairs", "chats") and self.template is None:
            self.template = ChatTemplate.choose(self.tokenizer, self.data.template)
            missing = self.template.missing_tokens(self.tokenizer) if self.template is not None else []
            if missing:
                logger.warning(
                    "data.template: %s writes %s, no special tokens of the model's; add them with tokens.add, or use plain",
                    self.template.name,  # type: ignore[union-attr]
                    ", ".join(missing),
                )
        return encoder_for(columns, source, self.tokenizer, self.template, self.data)


@dataclass(frozen=True)
class _Read:
    """One split of one source."""

    source: DatasetSource
    split: SplitName
    examples: datasets.Dataset
    encoder: Encoder


def _mix(sources: DatasetSource | Sequence[tuple[DatasetSource, float]]) -> list[Weighted]:
    from qlora_core.providers import DatasetSource

    return [Weighted(sources)] if isinstance(sources, DatasetSource) else [Weighted(*pair) for pair in sources]


def _read(source: DatasetSource, split: SplitName, encoders: _Encoders) -> _Read | None:
    import_libraries()
    import datasets

    with calling(source, f"examples({split!r})"):
        kinds, words = (datasets.Dataset, type(None)), "a datasets.Dataset or None"
        examples = answered(source, "examples", source.examples(split), kinds, words)
    if examples is None:
        return None
    return _Read(source, split, examples, encoders.make(examples.column_names, source.name))


def _judged(
    read: _Read, labelled: bool, found: dict[str, gate.Findings], rows: dict[str, int]
) -> tuple[datasets.Dataset, np.ndarray]:
    """Return the samples of *read* and the indices of those to use; add what was found to *found* and *rows*."""
    from qlora_core.data.samples import samples_of

    data, name = read.encoder.data, read.source.name
    samples = samples_of(read.examples, read.encoder, labelled=labelled)
    findings, kept = gate.check(samples, read.split, name, data)
    found.setdefault(read.split, gate.Findings()).merge(findings)
    rows[read.split] = rows.get(read.split, 0) + len(samples)
    return samples, kept


def _streamed(mix: Sequence[Weighted], encoders: _Encoders, seed: int) -> Encoded:
    """Return endless blocks of what *mix* gives, once the gate has seen the first rows of each source."""
    import datasets

    from qlora_core.data.stream import Stream, StreamedBlocks, first_rows

    data = encoders.data
    found: dict[str, gate.Findings] = {"train": gate.Findings()}
    rows: dict[str, int] = {"train": 0}
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
    digest, checked, used = hashlib.sha256(), [], 0
    for stream in streams:
        samples, part = first_rows(stream, data.gate_rows, labelled=labelled)
        findings, kept = gate.check(samples, "train", stream.source.name, data)
        found["train"].merge(findings)
        used += len(kept)
        rows["train"] += len(samples)
        digest.update(part.encode())
        checked.append(samples)
    judged = [_judged(read, labelled, found, rows) for read in evaluation]
    left_out = sum(rows.values()) - used - sum(len(kept) for _, kept in judged)
    for split, findings in found.items():
        gate.tell(findings, split, data)
    blocks = StreamedBlocks(streams, data, labelled=labelled, seed=seed)
    held_out = _blocks(judged, data) if judged else None
    made = tuple(stream.encoder for stream in streams)
    seen = datasets.concatenate_datasets(checked)
    return Encoded(blocks, held_out, digest.hexdigest(), encoders.template, found, rows, left_out, made, seen)


def _held_out(
    chosen: tuple[datasets.Dataset, np.ndarray], read: _Read, data: DataConfig
) -> tuple[tuple[datasets.Dataset, np.ndarray], tuple[datasets.Dataset, np.ndarray]]:
    samples, kept = chosen
    count = max(1, round(len(kept) * data.eval_fraction))
    if count >= len(kept):
        raise DataError(
            f"data.eval_fraction: {read.source.name!r} gives {len(kept)} sample{'s' if len(kept) > 1 else ''} of at most "
            f"{data.sequence_length} tokens, too few to hold any out; set data.eval_fraction=0, a smaller "
            "data.sequence_length, or add data"
        )
    out = np.zeros(len(kept), bool)
    if read.encoder.continuous:
        out[-count:] = True
    else:
        out[((np.arange(count) + 0.5) * len(kept) / count).astype(np.int64)] = True
    return (samples, kept[~out]), (samples, kept[out])


def _apart(
    ours: tuple[datasets.Dataset, np.ndarray],
    theirs: tuple[datasets.Dataset, np.ndarray],
    data: DataConfig,
    found: dict[str, gate.Findings],
) -> tuple[datasets.Dataset, np.ndarray]:
    """Return the training samples, and say which of them are also held out; without these where that is asked for."""
    samples, kept = ours
    both = gate.repeated(gate.column(samples, "digest")[kept], gate.column(theirs[0], "digest")[theirs[1]])
    if not both.any():
        return ours
    if data.deduplicate and both.all():
        raise DataError("data.deduplicate: every training sample is also held out, nothing is left; hold out other data")
    found["train"].add("overlap", int(both.sum()), *gate.named(samples, kept[both]))
    return samples, kept[~both] if data.deduplicate else kept


def _weighted(rows: np.ndarray, weight: float) -> np.ndarray:
    """Return *rows* as often as *weight* says: whole passes, and of the rest a share chosen evenly over all rows."""
    whole, share = divmod(weight, 1)
    count = max(round(share * len(rows)), 0 if whole else 1)
    spread = np.linspace(0, len(rows), count, endpoint=False).astype(np.int64)
    return np.concatenate([rows] * int(whole) + [rows[spread]])


def _blocks(parts: Sequence[tuple[datasets.Dataset, np.ndarray]], data: DataConfig) -> Blocks:
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


def _fingerprint(splits: Iterable[Sequence[tuple[datasets.Dataset, np.ndarray]]]) -> str:
    digest = hashlib.sha256()
    for parts in splits:
        for samples, rows in parts:
            digest.update(gate.column(samples, "digest")[rows].tobytes())
        digest.update(b"|")
    return digest.hexdigest()
