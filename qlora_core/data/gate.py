"""The gate: what is wrong with the data is told, and stops the run, before a model is loaded.

Works on the columns that stand beside the samples, which are made once and kept, so that it costs no time the second time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qlora_core.config import DataConfig
from qlora_core.data.findings import FINDINGS
from qlora_core.errors import DataError

if TYPE_CHECKING:
    import datasets

__all__ = [
    "Finding",
    "Findings",
    "check",
    "column",
    "judge",
    "lengths",
    "named",
    "repeated",
    "tell",
]

logger = logging.getLogger("qlora_core")

SHOWN = 3  # rows of each kind that a message names


@dataclass
class Finding:
    """One kind of finding in one split: how many rows have it, and the first of them, "where: what"."""

    what: str
    remedy: str
    error: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)
    needs: int = 0
    """Tokens of the longest of these rows, where they are too long."""

    @property
    def mending(self) -> str:
        """The remedy, with the sequence_length that would keep all."""
        return (
            f"set data.sequence_length to {self.needs} to keep all, or data.truncate=true to cut them"
            if self.needs
            else self.remedy
        )

    def __str__(self) -> str:
        rows = f"{self.count:,} row{'' if self.count == 1 else 's'}"
        more = f"; and {self.count - len(self.examples):,} more" if self.count > len(self.examples) > 0 else ""
        shown = f": {'; '.join(self.examples)}{more}" if self.examples else ""
        return f"{rows} with {self.what}{shown}. Remedy: {self.mending}"


class Findings(dict[str, Finding]):
    """What was found in a split, by code."""

    def add(self, code: str, count: int, *examples: str) -> None:
        """Count *count* more rows with the finding *code*."""
        kind = FINDINGS[code]
        finding = self.setdefault(code, Finding(kind.what, kind.remedy, kind.error))
        finding.count += count
        finding.examples += examples[: SHOWN - len(finding.examples)]

    def merge(self, others: Findings) -> None:
        """Count what *others* found, too."""
        for code, finding in others.items():
            self.add(code, finding.count, *finding.examples)
            self[code].needs = max(self[code].needs, finding.needs)

    @property
    def errors(self) -> list[Finding]:
        """Those that stop a run unless `data.on_problem` says otherwise."""
        return [finding for finding in self.values() if finding.error]


def check(
    samples: datasets.Dataset, split: str, source: str, data: DataConfig, seen: np.ndarray | None = None
) -> tuple[Findings, np.ndarray]:
    """Return what is wrong with *samples*, and the indices of those to use; raise DataError where that stops a run.

    *seen* are the digests of other samples of the split, which these may repeat.
    """
    if not len(samples):
        raise DataError(f"dataset: {source!r} gives no tokens in the {split} data; it is empty")
    findings, bad = judge(samples)
    if "long" in findings:
        findings["long"].needs = int(column(samples, "length").max())
    kept = usable(samples, bad, data)
    digests = column(samples, "digest")[kept]
    again = repeated(digests) | (repeated(digests, seen) if seen is not None else False)
    if again.any():
        findings.add("duplicate", int(again.sum()), *named(samples, kept[again]))
        kept = kept[~again] if data.deduplicate else kept
    tell_errors(findings, split, source, data)
    if not len(kept):
        why = "".join(f"\n  {finding}" for finding in findings.errors)
        raise DataError(f"dataset: {source!r}: no row of the {split} data has a supervised token that can be used{why}")
    _check_ends(samples, kept, source, data)
    return findings, kept


def judge(samples: datasets.Dataset) -> tuple[Findings, np.ndarray]:
    """Return what is wrong with *samples*, and which of them (N,) bool have an error."""
    findings = Findings()
    table = samples.data.table.select(["problems", "origin"])
    bad = np.zeros(len(samples), bool)
    start = 0
    for batch in table.to_batches():
        lengths = batch.column("problems").value_lengths().to_numpy(zero_copy_only=False)
        for index in np.flatnonzero(lengths):
            origin = batch.column("origin")[index].as_py()
            for problem in batch.column("problems")[index].as_py():
                code, _, detail = problem.partition(": ")
                findings.add(code, 1, f"{origin}: {detail}")
                bad[start + index] |= FINDINGS[code].error
        start += len(batch)
    return findings, bad


def usable(samples: datasets.Dataset, bad: np.ndarray, data: DataConfig) -> np.ndarray:
    """Return the indices of the samples to use: with `on_problem: warn` also bad ones, if they have a supervised token."""
    kept = column(samples, "supervised") > 0
    if data.on_problem != "warn":
        kept &= ~bad
    return np.flatnonzero(kept)


def repeated(digests: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Return which of *digests* (N,) repeat an earlier one, or with *others* stand among them: (N,) bool."""
    if others is not None:
        return np.isin(digests, others)
    _, first = np.unique(digests, return_index=True)
    again = np.ones(len(digests), bool)
    again[first] = False
    return again


def tell_errors(findings: Findings, split: str, source: str, data: DataConfig) -> None:
    """Raise DataError where *findings* stop the run."""
    if findings.errors and data.on_problem == "error":
        lines = "\n  ".join(str(finding) for finding in findings.errors)
        raise DataError(
            f"dataset: {source!r} has problems in the {split} data:\n  {lines}\n"
            "data.on_problem=skip leaves such rows out, data.on_problem=warn keeps those that can be kept"
        )


def tell(findings: Findings, split: str, data: DataConfig) -> None:
    """Log a warning for each of *findings*."""
    for finding in findings.values():
        done = " These are left out." if finding.error and data.on_problem == "skip" else ""
        logger.warning("%s data: %s.%s", split, finding, done, extra={"finding": True})


def _check_ends(samples: datasets.Dataset, rows: np.ndarray, source: str, data: DataConfig) -> None:
    """Raise DataError where answers are supervised and the end of none is: such a model would never learn to stop."""
    turns, ended = int(column(samples, "turns")[rows].sum()), int(column(samples, "ended")[rows].sum())
    if not turns or ended:
        return
    what = (
        f"dataset: {source!r} has {turns:,} supervised turns and the end of none is supervised: the template puts no special "
        "token after an answer, or each is cut off; choose another data.template, add its end of turn with tokens.add, or "
        "raise data.sequence_length"
    )
    if data.on_problem != "warn":  # no row to skip would mend it
        raise DataError(what)
    logger.warning("%s", what)


def named(samples: datasets.Dataset, rows: np.ndarray) -> list[str]:
    """Return where the first of *rows* come from."""
    return [str(samples.data.table.column("origin")[int(row)].as_py()) for row in rows[:SHOWN]]


def column(samples: datasets.Dataset, name: str) -> np.ndarray:
    """Return a column of numbers of *samples*, (N,)."""
    return samples.data.table.column(name).to_numpy()  # type: ignore[no-any-return]


def lengths(samples: datasets.Dataset) -> np.ndarray:
    """Return the number of tokens of each of *samples*, (N,) int64."""
    chunks = samples.data.table.column("input_ids").chunks
    found = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)
