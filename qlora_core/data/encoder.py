"""What makes samples of rows; `encoders` has one for each form that rows have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_core.config import DataConfig
from qlora_core.data.mask import IGNORED, Masked
from qlora_core.data.samples import Sample

if TYPE_CHECKING:
    import transformers

__all__ = ["Encoder"]


class Encoder:
    """Makes samples of rows that come in batches of columns."""

    rows: ClassVar[int] = 128
    """Rows per call: the tokenizer works on a batch in parallel."""

    labels: bool = True
    """Whether some tokens are not supervised."""

    continuous: bool = False
    """Whether rows are pieces of texts that others continue; then the end is held out, else samples spread over all."""

    state: Any = None
    """What is held of a row that is not complete yet, JSON-ready."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.data = data

    @property
    def settings(self) -> str:
        """What, beside rows and tokenizer, the samples depend on."""
        return f"{self.data.sequence_length} {self.data.truncate}"

    def encode(self, rows: dict[str, list[Any]], first: int) -> Iterator[Sample]:
        """Yield the samples of *rows*; *first* is the index of its first row."""
        raise NotImplementedError

    @staticmethod
    def origins(rows: dict[str, list[Any]], first: int) -> list[str]:
        """Return where each of *rows* comes from; by its number where the source does not say."""
        count = len(next(iter(rows.values())))
        return rows.get("origin") or [f"row {first + index + 1}" for index in range(count)]

    def finish(self) -> Iterator[Sample]:
        """Yield what is left once all rows have come."""
        yield from ()

    def fitted(self, sample: Sample, masked: Masked | None = None) -> Sample:
        """Return *sample* with at most `sequence_length` tokens, and with what is wrong about its length and labels noted.

        *masked* says where its turns and their ends stand: after a cut those that are left are counted.
        """
        limit = self.data.sequence_length
        sample.length = len(sample.ids)
        if sample.length > limit and not self.data.truncate:
            sample.note("long", f"{sample.length:,} tokens")
            sample.ids = sample.ids[:0]
            sample.labels = None if sample.labels is None else sample.labels[:0]
            return sample
        if sample.length > limit:
            sample.ids = sample.ids[:limit]
            lost = sample.length - limit
            if sample.labels is not None:
                lost = int((sample.labels[limit:] != IGNORED).sum())
                sample.labels = sample.labels[:limit]
            sample.note("cut", f"{sample.length:,} tokens, of which {sample.length - limit:,} ({lost:,} supervised) are lost")
            if masked is not None:
                sample.turns, sample.ended = masked.within(limit)
        if not sample.supervised:
            sample.note("unsupervised", f"{len(sample.ids)} tokens, all of them masked")
        return sample
