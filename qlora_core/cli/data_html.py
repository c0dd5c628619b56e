"""One HTML page with everything that `qlora data` knows: no scripts, nothing fetched, every text of the data escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from qlora_core.cli.data_facts import facts, finding_line, sample_line, summary_of, where
from qlora_core.data.inspect import Bin, Inspection
from qlora_core.data.preview import BlockView, SampleView, Token, visible

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --good: #b7e4c0; --warn: #8a5a00; --bad: #c62828; --line: #8884; --faint: #8882 }
@media (prefers-color-scheme: dark) { :root { --good: #1d5a2d; --warn: #ffc861; --bad: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { text-align: left; padding: .15rem .8rem .15rem 0 }
tbody tr { border-top: 1px solid var(--line) } .bar { background: #5b8def; height: .9em; min-width: 1px }
.chart td:nth-child(2) { width: 30rem } .limit td { border-top: 2px dashed var(--warn) }
section { border: 1px solid var(--line); border-radius: 6px; margin: 1.5rem 0; padding: 0 1rem } h3 { font-size: 1rem }
article { border-top: 4px double var(--line) } .warn { color: var(--warn); font-weight: bold }
.error { color: var(--bad); font-weight: bold }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace }
i { font-style: normal; opacity: .65 } i, b { border-right: 1px solid var(--line) }
b { font-weight: normal; background: var(--good) } .x { outline: 1px solid; border-radius: 3px; opacity: 1; font-weight: bold }
.w { background: var(--bad); color: #fff }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(found: Inspection) -> str:
    """Return the page. Each token has its index, id and label as a title, which a pointer over it shows."""
    return "".join(f"{line}\n" for line in _lines(found))


def _lines(found: Inspection) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>qlora data</title>'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>qlora data</h1>'
    yield _table(None, [[name, text] for name, text in facts(found)])
    summaries = {split: dict(summary_of(counts, found.sequence_length)) for split, counts in found.statistics.items()}
    names = dict.fromkeys(name for summary in summaries.values() for name in summary)
    yield _table(["", *summaries], [[name, *(summary.get(name, "") for summary in summaries.values())] for name in names])
    for split, counts in found.statistics.items():
        yield f"<h2>{escape(split)}: samples by length in tokens</h2>"
        yield _chart(counts.histogram, found.sequence_length)
    yield from _findings(found)
    if found.blocks:
        yield '<h2>Samples</h2>\n<p><i>masked</i> <b>supervised</b> <i class="x">special token</i> '
        yield '<b class="x">special, supervised</b> <b class="w">label of another token</b> ⏎ line break</p>'
    for block in found.blocks:
        yield from _block(block, found)
    yield "</body>\n</html>"


def _table(head: list[str] | None, rows: list[list[str]]) -> str:
    def cell(text: str) -> str:
        return f'<td class="warn">{escape(text)}</td>' if "⚠" in text else f"<td>{escape(text)}</td>"

    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "\n".join(f"<tr><th>{escape(row[0])}</th>{''.join(map(cell, row[1:]))}</tr>" for row in rows)
    return f"<table>{top}<tbody>\n{body}\n</tbody></table>"


def _chart(bins: list[Bin], limit: int) -> str:
    most = max(one.count for one in bins)
    mark = f'<tr class="limit"><td colspan="3">sequence_length {limit:,}</td></tr>'
    rows = []
    for one in bins:
        if one.low > limit and mark not in rows:
            rows.append(mark)
        bar = f'<div class="bar" style="width:{100 * one.count / most:.1f}%"></div>' if one.count else ""
        span = f"{one.low:,}–{one.high:,}" if one.low < one.high else f"{one.low:,}"
        rows.append(f"<tr><td>{span}</td><td>{bar}</td><td>{one.count:,}</td></tr>")
    rows += [] if mark in rows else [mark]
    return '<table class="chart"><tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


def _findings(found: Inspection) -> Iterator[str]:
    yield "<h2>Findings</h2>" if found.findings else "<p>The gate found nothing.</p>"
    for one in found.findings:
        yield f'<p class="{"error" if one.error else "warn"}">{escape(finding_line(one))}</p>\n<ul>'
        yield from (f"<li>{escape(visible(where(example)))}</li>" for example in one.examples)
        yield f"<li>remedy: {escape(one.remedy)}</li>\n</ul>"


def _block(block: BlockView, found: Inspection) -> Iterator[str]:
    count = len(block.samples)
    title = f"block {block.index + 1:,} of {found.statistics['train'].blocks:,}, {block.tokens:,} tokens"
    yield f"<section>\n<h2>{title}</h2>"
    for number, sample in enumerate(block.samples, 1):
        heading = f"sample {number} of {count} · {where(sample.origin)} · {len(sample.tokens):,} tokens"
        yield f"<article>\n<h3>{escape(visible(heading))}</h3>\n<pre>{''.join(_tokens(sample))}</pre>"
        yield f"<p>{escape(sample_line(sample))}</p>"
        yield from (f'<p class="warn">⚠ {escape(visible(warning))}</p>' for warning in sample.warnings)
        yield "</article>"
    yield "</section>"


def _tokens(sample: SampleView) -> Iterator[str]:
    """Yield the tokens, those that share a character together."""
    group: list[Token] = []
    for token in [*sample.tokens, None]:
        if group and (token is None or not token.joins):
            yield _token(group)
            group = []
        if token is not None:
            group.append(token)


def _token(group: list[Token]) -> str:
    first = group[0]
    name = "b" if any(token.supervised for token in group) else "i"
    kinds = ["x"] * first.special + ["w"] * any(token.label not in (None, token.id) for token in group)
    labels = ["none" if token.label is None else str(token.label) for token in group]
    title = " + ".join(f"{t.index}: id {t.id}, label {label}" for t, label in zip(group, labels, strict=True))
    text = escape(visible(first.text)).replace("\n", "⏎\n")
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<{name}{kind} title="{title}">{text}</{name}>'
