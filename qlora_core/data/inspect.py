"""What the data look like before training: statistics, and samples token by token, as plain numbers and texts.

Computes, and draws nothing. What is counted here is counted from the columns beside the samples, not from the encoder's
word: a template or a mask that is wrong shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qlora_core.config import DataConfig, RunConfig
from qlora_core.data import gate
from qlora_core.data.blocks import Blocks
from qlora_core.data.preview import BlockView, view

if TYPE_CHECKING:
    import datasets

    from qlora_core.data.encode import Encoded
    from qlora_core.data.encoder import Encoder
    from qlora_core.parts import Weighted
    from qlora_core.pipeline import Prepared

__all__ = ["Bin", "Found", "Inspection", "Statistics", "Supervision", "histogram", "inspect", "statistics"]

Ints = npt.NDArray[Any]

BINS = 10  # of a histogram, at most
LINEAR = 50  # times the shortest length that the longest may be, for bins that are equally wide


@dataclass(frozen=True)
class Bin:
    """Samples with *low* to *high* tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Found:
    """A kind of finding of the gate in one split, with the first rows that have it."""

    split: str
    code: str
    what: str
    count: int
    error: bool
    examples: list[str]
    remedy: str


@dataclass(frozen=True)
class Supervision:
    """What a source gives and which tokens of it are supervised, as `train_on` came out."""

    source: str
    form: str
    train_on: str


@dataclass(frozen=True)
class Statistics:
    """Counts over the blocks of a split; a sample that a weight takes twice counts twice.

    `packing_efficiency` is tokens / (blocks * sequence_length); without packing it is None, and `padding_share` is the share
    of all positions in the batches that are padding. `answers` are supervised turns, `ended` those whose end-of-turn token
    is supervised, `cut` the samples that lose their end, `lost` the tokens of it.
    """

    samples: int
    distinct: int
    tokens: int
    supervised: int
    supervised_share: float
    shortest: int
    median: float
    longest: int
    blocks: int
    packing_efficiency: float | None
    padding_share: float | None
    answers: int
    ended: int
    cut: int
    lost: int
    histogram: list[Bin]
    """Of lengths before anything is cut; in the training data those that are left out as too long, too."""


@dataclass(frozen=True)
class Inspection:
    """Everything that `qlora data` shows, ready for JSON."""

    sequence_length: int
    packing: bool
    streaming: bool
    """Then the statistics of the training data are those of the first rows, as many as the gate saw."""
    read: dict[str, int]
    """Samples before any was left out; those held out count as "train" where there is no evaluation data of its own."""
    left_out: int
    """Samples that the gate, or deduplication, took away."""
    template: str | None
    end_of_turn: str | None
    spelt_out: list[str]
    """Control tokens of the template that the tokenizer does not have: they are spelt with ordinary ones."""
    supervision: list[Supervision]
    statistics: dict[str, Statistics]
    findings: list[Found]
    blocks: list[BlockView]


def inspect(config: RunConfig, sources: Sequence[Weighted], prepared: Prepared, samples: int = 3) -> Inspection:
    """Return what the data of *config* look like, with *samples* training blocks, evenly spread, token by token."""
    from qlora_core.data.mask import end_of_turn

    encoded, tokenizer = prepared.encoded, prepared.tokenizer
    template = encoded.template
    train = encoded.train if encoded.checked is None else _packed(encoded.checked, config.data)
    assert isinstance(train, Blocks)
    splits = {"train": train} | ({"eval": encoded.eval} if encoded.eval is not None else {})
    end = end_of_turn(tokenizer, template) if template is not None else None
    wanted = np.unique(np.linspace(0, len(train) - 1, samples).round().astype(np.int64))
    return Inspection(
        sequence_length=config.data.sequence_length,
        packing=config.data.packing,
        streaming=config.data.streaming,
        read=dict(encoded.rows),
        left_out=encoded.left_out,
        template=template.name if template is not None else None,
        end_of_turn=tokenizer.convert_ids_to_tokens(end) if end is not None else None,
        spelt_out=template.missing_tokens(tokenizer) if template is not None else [],
        supervision=[
            _supervision(source.name, encoder) for (source, _), encoder in zip(sources, encoded.encoders, strict=True)
        ],
        statistics={name: statistics(one, name, config, own_rows=name in encoded.rows) for name, one in splits.items()},
        findings=_findings(encoded),
        blocks=[view(train, int(index), tokenizer) for index in wanted],
    )


def statistics(blocks: Blocks, name: str, config: RunConfig, *, own_rows: bool = True) -> Statistics:
    """Return the counts of *blocks*; with *own_rows* its histogram has the samples, too, that are too long to be used."""
    from qlora_core.training.order import padding_share, training_order

    data, rows = config.data, blocks.rows()
    numbers = {key: gate.column(blocks.table, key).astype(np.int64) for key in ("length", "supervised", "turns", "ended")}
    kept = gate.lengths(blocks.table)
    lengths, whole = kept[rows], numbers["length"][rows]
    too_long = numbers["length"][(kept == 0) & (numbers["length"] > data.sequence_length)] if own_rows else whole[:0]
    tokens, supervised = int(lengths.sum()), int(numbers["supervised"][rows].sum())
    padding = None
    if not blocks.packed:
        size = config.training.batch_size if name == "train" else config.training.eval_batch_size or config.training.batch_size
        order = training_order(blocks.lengths, config.training.seed, 0, size) if name == "train" else None
        padding = padding_share(blocks.lengths, size, data.pad_to_multiple_of, order)
    return Statistics(
        samples=len(rows),
        distinct=len(np.unique(rows)),
        tokens=tokens,
        supervised=supervised,
        supervised_share=supervised / tokens,
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        blocks=len(blocks),
        packing_efficiency=tokens / (len(blocks) * data.sequence_length) if blocks.packed else None,
        padding_share=padding,
        answers=int(numbers["turns"][rows].sum()),
        ended=int(numbers["ended"][rows].sum()),
        cut=int((whole > lengths).sum()),
        lost=int((whole - lengths).clip(0).sum()),
        histogram=histogram(np.concatenate([whole, too_long]), data.sequence_length),
    )


def histogram(lengths: Ints, limit: int) -> list[Bin]:
    """Return *lengths* counted in at most BINS bins, and one more where *limit* parts one in two: it ends a bin.

    Bins are equally wide and end at round numbers; where the longest is more than LINEAR times the shortest, they end at
    powers of two, each twice as wide as the one before.
    """
    if not len(lengths):
        return []
    low, high = max(1, int(lengths.min())), max(1, int(lengths.max()))
    if high > LINEAR * low:
        last = (high - 1).bit_length()
        edges = [0, *(2**power for power in range(max(0, last - BINS + 1), last + 1))]
    else:
        steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
        step = next(step for step in steps if (high - 1) // step - (low - 1) // step < BINS)
        edges = [*range((low - 1) // step * step, high + step, step)]
    if low <= limit < edges[-1]:
        edges = sorted({*edges, limit})
    counts = np.histogram(lengths, np.array(edges) + 0.5)[0].tolist()
    made = [Bin(start + 1, end, count) for (start, end), count in zip(itertools.pairwise(edges), counts, strict=True)]
    used = [index for index, one in enumerate(made) if one.count]
    return made[used[0] : used[-1] + 1]


def _supervision(source: str, encoder: Encoder) -> Supervision:
    from qlora_core.data.encoders import ChatEncoder
    from qlora_core.data.text import TextEncoder

    if isinstance(encoder, ChatEncoder):
        return Supervision(source, "prompts" if encoder.train_on == "completion" else "chats", encoder.train_on)
    form = "text" if isinstance(encoder, TextEncoder) else "tokens"
    return Supervision(source, form, "labels" if encoder.labels else "all")


def _findings(encoded: Encoded) -> list[Found]:
    """Return what the gate found, by split; errors first, then by how many rows have it."""
    return [
        Found(split, code, one.what, one.count, one.error, list(one.examples), one.mending)
        for split, found in encoded.findings.items()
        for code, one in sorted(found.items(), key=lambda item: (not item[1].error, -item[1].count))
    ]


def _packed(samples: datasets.Dataset, data: DataConfig) -> Blocks:
    """Return the blocks of the samples that can be used, `data.buffer` of them packed together at a time."""
    from qlora_core.data.pack import pack

    rows = gate.usable(samples, gate.judge(samples)[1], data)
    if not data.packing:
        return Blocks(samples, (np.arange(len(rows) + 1), rows), packed=False)
    offsets, indices = [np.zeros(1, np.int64)], []
    for start in range(0, len(rows), data.buffer):
        some = rows[start : start + data.buffer]
        bounds, chosen = pack(gate.lengths(samples)[some], data.sequence_length)
        offsets.append(bounds[1:] + start)
        indices.append(some[chosen])
    return Blocks(samples, (np.concatenate(offsets), np.concatenate(indices)), packed=True)
