"""What `qlora data` says about the data in words, for the terminal and for HTML alike."""

from __future__ import annotations

import os

from qlora_core.data.inspect import Found, Inspection, Statistics
from qlora_core.data.preview import SampleView

__all__ = ["facts", "finding_line", "sample_line", "summary_of", "where"]

SUPERVISED = {
    "all": "every token",
    "completion": "the completion",
    "assistant": "what the assistant says",
    "last_turn": "the last answer",
    "labels": "what the labels say",
}
"""What is supervised, by train_on."""


def facts(found: Inspection) -> list[tuple[str, str]]:
    """Return what holds for the whole of the data, as names and texts."""
    counts = " and ".join(f"{count:,} {split}" for split, count in found.read.items())
    lines = [("read", f"{counts} samples, {found.left_out:,} left out")]
    if found.streaming:
        lines.append(("streaming", "these are the first rows of the stream, as many as data.gate_rows says; it goes on"))
    for one in found.supervision:
        lines.append(("supervised", f"{SUPERVISED[one.train_on]} ({one.source}: {one.form}, train_on {one.train_on})"))
    if found.template is not None:
        name = "the tokenizer's own" if found.template == "tokenizer" else found.template
        ends = f"ends an answer with {found.end_of_turn}" if found.end_of_turn else "⚠ ends an answer with no special token"
        lines.append(("template", f"{name}, {ends}"))
    if found.spelt_out:
        missing = ", ".join(found.spelt_out)
        lines.append(("⚠ no tokens", f"{missing}: the tokenizer has them not, so they are spelt with several others"))
    return lines


def summary_of(counts: Statistics, sequence_length: int) -> list[tuple[str, str]]:
    """Return the counts of a split as names and texts."""
    lines = [
        ("samples", f"{counts.samples:,}" + (f" ({counts.distinct:,} distinct)" if counts.distinct < counts.samples else "")),
        ("tokens", f"{counts.tokens:,}"),
        ("supervised", f"{counts.supervised:,} ({100 * counts.supervised_share:.1f} %)"),
        ("tokens per sample", f"{counts.shortest:,} to {counts.longest:,}, median {counts.median:,g}"),
        ("blocks", f"{counts.blocks:,} of {sequence_length:,}"),
    ]
    if counts.packing_efficiency is not None:
        lines.append(("packing", f"{100 * counts.packing_efficiency:.1f} % full"))
    if counts.padding_share is not None:
        lines.append(("padding", f"{100 * counts.padding_share:.1f} % of the positions"))
    if counts.answers:
        missing = counts.answers - counts.ended
        tail = f", ⚠ {missing:,} without a supervised end" if missing else ", all with a supervised end"
        lines.append(("answers", f"{counts.answers:,}{tail}"))
    lost = f"⚠ {counts.cut:,} sample{'s' if counts.cut > 1 else ''}, {counts.lost:,} tokens lost" if counts.cut else "none"
    return [*lines, ("cut off", lost)]


def finding_line(one: Found) -> str:
    """Return what the gate found, and in how many rows."""
    return f"⚠ {one.split}: {one.count:,} row{'' if one.count == 1 else 's'} with {one.what} ({one.code})"


def sample_line(sample: SampleView) -> str:
    """Return how much of *sample* is supervised, and how that ends."""
    answers = f"{sample.answers} answer{'s' if sample.answers > 1 else ''}, {sample.ended} with a supervised end · "
    counts = f"supervised {sample.supervised:,} of {len(sample.tokens):,} tokens"
    return f"{counts} · {answers if sample.answers else ''}{sample.ending}"


def where(origin: str) -> str:
    """Return *origin* with a path that is as short as possible from here."""
    if not os.path.isabs(origin):
        return origin
    try:
        return min(os.path.relpath(origin), origin, key=len)
    except ValueError:  # another drive
        return origin
