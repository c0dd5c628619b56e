"""Which samples are trained on, how often, and which are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_core.config import DataConfig
from qlora_core.data import gate
from qlora_core.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["Portion", "apart", "held_out", "weighted"]


class Portion(NamedTuple):
    """Samples, and the indices (N,) int64 of those that are meant."""

    samples: datasets.Dataset
    rows: np.ndarray

    @property
    def digests(self) -> np.ndarray:
        """The digests of the samples that are meant, (N,) int64."""
        digests: np.ndarray = gate.column(self.samples, "digest")[self.rows]
        return digests


def held_out(portion: Portion, data: DataConfig, source: str, *, continuous: bool) -> tuple[Portion, Portion]:
    """Return what is trained on and `eval_fraction` that is not: the end of a *continuous* text, else rows spread evenly."""
    samples, rows = portion
    count = max(1, round(len(rows) * data.eval_fraction))
    if count >= len(rows):
        has = f"{source!r} gives {len(rows)} sample{'s' if len(rows) > 1 else ''}"
        raise DataError(
            f"data.eval_fraction: {has} of at most {data.sequence_length} tokens, too few to hold any out; "
            "set data.eval_fraction=0, a smaller data.sequence_length, or add data"
            if len(rows) == 1
            else f"data.eval_fraction: {has}, of which {data.eval_fraction:g} are {count}; set a smaller one, or 0"
        )
    out = np.zeros(len(rows), bool)
    if continuous:
        out[-count:] = True
    else:
        out[((np.arange(count) + 0.5) * len(rows) / count).astype(np.int64)] = True
    return Portion(samples, rows[~out]), Portion(samples, rows[out])


def apart(portion: Portion, evaluation: np.ndarray, data: DataConfig, findings: gate.Findings) -> Portion:
    """Return *portion*, and say which of it have a digest in *evaluation*; without these where deduplication is asked for."""
    both = gate.repeated(portion.digests, evaluation)
    if not both.any():
        return portion
    if data.deduplicate and both.all():
        raise DataError("data.deduplicate: every training sample is also held out, nothing is left; hold out other data")
    findings.add("overlap", int(both.sum()), *gate.named(portion.samples, portion.rows[both]))
    return Portion(portion.samples, portion.rows[~both]) if data.deduplicate else portion


def weighted(portion: Portion, weight: float) -> Portion:
    """Return *portion* as often as *weight* says: whole passes, and of the rest a share spread evenly over all rows."""
    rows = portion.rows
    whole, share = divmod(weight, 1)
    count = max(round(share * len(rows)), 0 if whole else 1)
    spread = np.linspace(0, len(rows), count, endpoint=False).astype(np.int64)
    return Portion(portion.samples, np.concatenate([rows] * int(whole) + [rows[spread]]))
