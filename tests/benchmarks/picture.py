"""Pictures of readings as SVG, written by hand: they need no plotting library and fetch nothing from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#3b6fb6", "#c2602b", "#4c8c4a", "#8a5aa8")
WIDTH = 760
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:13px;fill:#24292f}"
    ".title{font-size:16px;font-weight:600}.small{fill:#57606a}"
)

Points = Sequence[tuple[float, float]]


def ticks(most: float, about: int = 5) -> list[float]:
    """Return round numbers from 0 up to the first that is not below *most*, some *about* of them."""
    rough = max(most, 1e-12) / about
    power = 1.0
    while power * 10 <= rough:
        power *= 10
    while power > rough:
        power /= 10
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    count = 0
    while count * step < most - 1e-9 * step:
        count += 1
    return [number * step for number in range(count + 1)]


def lines(title: str, x: str, y: str, series: Mapping[str, Points]) -> str:
    """Return a chart of *series* (name: points) as SVG, both axes from 0; *x* and *y* name what they show, with units."""
    left, top, width, height = 70, 60, WIDTH - 220, 300
    points = [point for line in series.values() for point in line]
    across, up = ticks(max(p[0] for p in points), 8), ticks(max(p[1] for p in points))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + width * point[0] / across[-1], top + height * (1 - point[1] / up[-1])

    parts = [
        _text(left, 30, title, "title"),
        _text(left, 50, y, "small"),
        _text(left + width, top + height + 40, x, "small", "end"),
    ]
    for value in up:
        _, level = place((0, value))
        parts += [_rule(left, level, left + width, level), _text(left - 8, level + 4, f"{value:g}", "small", "end")]
    for value in across:
        at, _ = place((value, 0))
        parts.append(_text(at, top + height + 20, f"{value:,g}", "small", "middle"))
    levels = _separate({name: place(max(line))[1] for name, line in series.items()})
    for colour, (name, line) in zip(COLOURS, series.items(), strict=False):
        placed = [place(point) for point in sorted(line)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in placed]
        parts.append(_text(placed[-1][0] + 10, levels[name] + 4, name, colour=colour))
    return _svg(WIDTH, top + height + 60, title, parts)


def bars(title: str, labels: Sequence[str], panels: Mapping[str, Sequence[float]], form: str = "{:,.0f}") -> str:
    """Return horizontal bars as SVG: a row for each of *labels*, a panel for each list of values; *form* writes a value."""
    left, top, row = 230, 70, 30
    width = (WIDTH - left - 20) // len(panels)
    parts = [_text(16, 30, title, "title")]
    for index, label in enumerate(labels):
        parts.append(_text(left - 12, top + row * index + 19, label, anchor="end"))
    for column, (colour, (name, values)) in enumerate(zip(COLOURS, panels.items(), strict=False)):
        start, most = left + column * width, max(values)
        parts.append(_text(start, top - 10, name, "small"))
        for index, value in enumerate(values):
            long, level = (width - 80) * value / most, top + row * index + 5
            parts.append(f'<rect x="{start}" y="{level}" width="{long:.1f}" height="20" rx="2" fill="{colour}"/>')
            written = (form if most >= 20 else "{:.2f}").format(value)
            parts.append(_text(start + long + 6, level + 15, written))
    return _svg(WIDTH, top + row * len(labels) + 20, title, parts)


def _separate(levels: Mapping[str, float], least: float = 16) -> dict[str, float]:
    """Return *levels* from the top down, each moved until it is at least *least* below the one before."""
    found: dict[str, float] = {}
    for name in sorted(levels, key=lambda name: levels[name]):
        found[name] = max(levels[name], max(found.values(), default=-least) + least)
    return found


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", colour: str = "") -> str:
    style = (f' class="{kind}"' if kind else "") + (f' style="fill:{colour}"' if colour else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d8dee4"/>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    paper = f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", paper, *parts, "</svg>"]) + "\n"
