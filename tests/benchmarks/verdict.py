"""From raw readings to the lines of the table: medians, the best peer, ratios, and whether a target is met.

A reading here is a dict of figures of one run: `rate` (tokens/s; of `startup` the seconds), `interval_rate` (tokens/s from the
end of one step to the end of the next, all that lies between included), `peak` and `resident` (bytes).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from process import Reading
from settings import PEERS, Setting

Readings = Mapping[str, Sequence[Mapping[str, Any]]]
WARM_UP = 2  # steps that are not measured


def figures(setting: Setting, reading: Reading) -> dict[str, Any]:
    """Return what *reading* says of *setting*, raw values included."""
    report = reading.report
    common = {
        "peak": reading.peak(),
        "resident": reading.resident,
        "seconds": reading.seconds,
        "others": reading.others,
        "spawned": reading.started,
        "report": report,
    }
    if setting.work in ("evaluate", "generate"):
        return {"rate": report["tokens"] / report["seconds"], **common}
    startup = report["begins"][0] - reading.started
    if setting.work == "startup":
        return {"rate": startup, **common}
    peaks = {
        "peak_before_training": reading.peak(0, report["begins"][0]),
        "peak_in_training": reading.peak(report["begins"][0]),
    }
    return {**speeds(report, ragged=setting.ragged), "startup": startup, **peaks, **common}


def speeds(report: Mapping[str, Any], *, ragged: bool) -> dict[str, float]:
    """Return `rate`, tokens/s within steps, and `interval_rate`, tokens/s over all the time between their ends.

    The first WARM_UP steps are left out. Of equal steps the median counts. Ragged ones differ, so that all their supervised
    tokens over all their time do.
    """
    ends, tokens = report["ends"], report["supervised" if ragged else "positions"][WARM_UP:]
    inside = [end - begin for begin, end in zip(report["begins"], ends, strict=True)][WARM_UP:]
    between = [after - before for before, after in itertools.pairwise(ends)][WARM_UP - 1 :]
    if not tokens:
        raise ValueError(f"{len(ends)} steps are too few: the first {WARM_UP} are not measured")
    if ragged:
        return {"rate": sum(tokens) / sum(inside), "interval_rate": sum(tokens) / sum(between)}
    return {"rate": _median_rate(tokens, inside), "interval_rate": _median_rate(tokens, between)}


def _median_rate(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(count / time for count, time in zip(tokens, seconds, strict=True))


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    setting: str
    words: str
    unit: str
    values: Mapping[str, float]
    """Medians by peer, and of ours."""
    ratio: float | None = None
    """Ours over the best peer; of the bound, the share reached."""
    target: float | None = None
    met: bool | None = None
    best: str | None = None
    """The best peer."""
    spread: tuple[float, float] | None = None
    """The least and the largest ratio of one round."""


def lines(setting: Setting, readings: Readings, *, bound: float | None = None) -> list[Line]:
    """Return the lines of *setting*; *bound* is the tokens/s that matrix multiplication alone allows."""
    if setting.work == "startup":
        return [_line(setting, readings, "rate", "s", setting.words, None, lower=True)]
    unit = "supervised tokens/s" if setting.ragged else "tokens/s"
    table = [_line(setting, readings, "rate", unit, setting.words, setting.speed, lower=False)]
    if bound is not None and setting.bound is not None and "ours" in readings:
        ours = table[0].values["ours"]
        share = ours / bound
        values = {"bound": bound, "ours": ours}
        met = share >= setting.bound
        words = f"  share of the matmul bound, {bound:,.0f}"
        table.append(Line(setting.name, words, unit, values, share, setting.bound, met))
    table.append(_line(setting, readings, "peak", "bytes", "  peak memory", setting.memory, lower=True))
    table.append(_line(setting, readings, "resident", "bytes", "  peak resident set", None, lower=True))
    return table


def _line(setting: Setting, readings: Readings, key: str, unit: str, words: str, target: float | None, *, lower: bool) -> Line:
    values = {who: statistics.median(one[key] for one in runs) for who, runs in readings.items() if runs}
    peers = [who for who in PEERS if who in values]
    if not peers or "ours" not in values:
        return Line(setting.name, words, unit, values)
    best = (min if lower else max)(peers, key=values.__getitem__)
    ratio = values["ours"] / values[best]
    each = [ours[key] / peer[key] for ours, peer in zip(readings["ours"], readings[best], strict=False)]
    met = None if target is None else ratio <= target if lower else ratio >= target
    return Line(setting.name, words, unit, values, ratio, target, met, best, (min(each), max(each)))


def shown(value: float, unit: str) -> str:
    """Return *value* as the table writes it."""
    return f"{value / 1e9:.2f} GB" if unit == "bytes" else f"{value:.1f} s" if unit == "s" else f"{value:,.0f}"


def table(all_lines: Sequence[Line], title: str) -> Any:
    """Return the lines as a table of rich."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for column in ("setting", "what", "unit", *PEERS, "ours", "ratio", "target", "met"):
        made.add_column(column, justify="left" if column in ("setting", "what", "unit") else "right")
    for line in all_lines:
        cells = [shown(line.values[who], line.unit) if who in line.values else "" for who in (*PEERS, "ours")]
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
        sign = "<=" if line.unit == "bytes" else ">="
        target = "" if line.target is None else f"{sign} {line.target:g}"
        met = "" if line.met is None else "[green]yes[/]" if line.met else "[red]no[/]"
        name = "" if line.words.startswith(" ") else line.setting
        made.add_row(name, line.words, "" if line.unit == "bytes" else line.unit, *cells, ratio, target, met)
    return made
