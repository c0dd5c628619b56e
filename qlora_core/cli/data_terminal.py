"""Draw what `qlora data` shows on a terminal, with colours; or in plain text, where marks stand for them."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qlora_core.cli.data_facts import facts, finding_line, sample_line, summary_of, where
from qlora_core.data.inspect import Bin, Inspection
from qlora_core.data.preview import BlockView, SampleView, Token, shown, visible

__all__ = ["Preview", "print_statistics"]

BAR = 40  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
RULE = 100  # characters of the line above a sample
SAMPLES = 4  # of a block that are shown, without --full
STYLES = {
    (False, False): "dim",
    (False, True): "green",
    (True, False): "magenta",
    (True, True): "bold black on green",
}
"""By whether a token is special and whether it is supervised."""
WRONG = "bold white on red"
LEGEND = "masked  ⟦supervised⟧  «special token»  ⏎ line break"


def print_statistics(console: Console, found: Inspection) -> None:
    """Print what holds for all of the data, the counts of each split, the lengths, and what the gate found."""
    for name, text in facts(found):
        style = "bold yellow" if "⚠" in name + text else "bold"
        console.print(f"[{style}]{name:<11}[/{style}] {escape(text)}", soft_wrap=True)
    summaries = {split: dict(summary_of(counts, found.sequence_length)) for split, counts in found.statistics.items()}
    table = Table("", *summaries)
    for name in dict.fromkeys(name for summary in summaries.values() for name in summary):
        cells = [escape(summary.get(name, "")) for summary in summaries.values()]
        table.add_row(name, *(f"[bold yellow]{cell}[/bold yellow]" if "⚠" in cell else cell for cell in cells))
    console.print(table)
    console.print("[bold]training samples by length in tokens[/bold]")
    for line in bars(found.statistics["train"].histogram, found.sequence_length):
        console.print(line, markup=False, soft_wrap=True)
    for one in found.findings:
        console.print(Text(finding_line(one), "bold red" if one.error else "bold yellow"), soft_wrap=True)
        for text in (*(visible(where(example)) for example in one.examples), f"remedy: {one.remedy}"):
            console.print(f"    {text}", markup=False, soft_wrap=True)


def bars(bins: list[Bin], limit: int) -> list[str]:
    """Return a line for each of *bins* with a bar, and one where *limit* lies."""
    most, width = max(one.count for one in bins), len(f"{bins[-1].high:,}")
    lines, mark = [], f"{'':{2 * width + 1}} ┄ sequence_length {limit:,}"
    for one in bins:
        if one.low > limit and mark not in lines:
            lines.append(mark)
        eighths = max(1, round(8 * BAR * one.count / most)) if one.count else 0
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        span = f"{one.low:>{width},}–{one.high:<{width},}" if one.low < one.high else f"{one.low:>{width},}{'':{width + 1}}"
        lines.append(f"{span} │{bar} {one.count:,}")
    return lines if mark in lines else [*lines, mark]


class Preview:
    """Prints blocks to the *console*: with styles where it has colours, else with marks."""

    def __init__(self, console: Console, found: Inspection, *, tokens: bool, full: bool) -> None:
        self.console = console
        self.found = found
        self.tokens = tokens
        self.full = full
        self.colour = console.color_system is not None and not console.no_color

    def print(self) -> None:
        """Print every block with its samples, and what the marks mean before them."""
        legend = Text(f"\n{LEGEND}")
        if self.colour:
            named = {"masked": (False, False), "supervised": (False, True), "special": (True, False)}
            styled = [(text, STYLES[key]) for text, key in named.items()]
            styled += [("special, supervised", STYLES[True, True]), ("label of another token", WRONG)]
            legend = Text.assemble("\n", *(part for one in styled for part in (one, "  ")), "⏎ line break")
        self.console.print(legend)
        for block in self.found.blocks:
            self._block(block)

    def _block(self, block: BlockView) -> None:
        count = len(block.samples)
        if self.found.packing:
            total, some = self.found.statistics["train"].blocks, f"{count:,} sample{'s' if count > 1 else ''}"
            self._rule(f"━━ block {block.index + 1:,} of {total:,} · {some} · {block.tokens:,} tokens ", "━", "bold cyan")
        hidden = range(0) if self.full else range(SAMPLES - 1, count - 1)
        for index, sample in enumerate(block.samples):
            if index not in hidden:
                title = f"sample {index + 1} of {count}" if self.found.packing else f"sample {block.index + 1:,}"
                self._sample(sample, title)
            elif index == hidden[0]:
                tokens = sum(len(block.samples[other].tokens) for other in hidden)
                more = f"\n⋯ {len(hidden):,} more sample{'s' if len(hidden) > 1 else ''} in this block, {tokens:,} tokens; "
                self.console.print(Text(f"{more}--full shows them ⋯", "italic cyan"), soft_wrap=True)

    def _sample(self, sample: SampleView, title: str) -> None:
        origin = f" · {visible(where(sample.origin))}" if sample.origin else ""
        self._rule(f"── {title}{origin} · {len(sample.tokens):,} tokens ", "─", "cyan")
        pieces: list[Token | int] = [*sample.tokens] if self.full else shown(sample.tokens)
        self.console.print(self._listed(pieces) if self.tokens else self._flowing(pieces), soft_wrap=True)
        self.console.print(Text(sample_line(sample), "bold"), soft_wrap=True)
        for warning in sample.warnings:
            self.console.print(Text(f"⚠ {visible(warning)}", "bold yellow"), soft_wrap=True)

    def _rule(self, text: str, mark: str, style: str) -> None:
        line = text + mark * max(2, min(RULE, self.console.width) - len(text))
        self.console.print(Text(f"\n{line}", style), soft_wrap=True)

    def _flowing(self, pieces: list[Token | int]) -> Text:
        """Return the tokens as running text."""
        text, inside = Text(), False
        for piece in pieces:
            if isinstance(piece, int):
                text.append(f" ⋯ {piece:,} tokens ⋯ ", "italic cyan")
                continue
            if piece.joins:  # its text stands at the token before
                continue
            if piece.supervised != inside and not self.colour:
                text.append("⟦" if piece.supervised else "⟧")
                inside = piece.supervised
            said = visible(piece.text).replace("\n", "⏎\n")
            style = f"{self._style(piece)} underline" if self.colour and piece.index % 2 else self._style(piece)
            text.append(f"«{said}»" if piece.special and not self.colour else said, style)
        text.append("⟧" if inside else "")
        text.rstrip()
        return text

    def _listed(self, pieces: list[Token | int]) -> Text:
        """Return one line per token, with marks around its text in colour, too: spaces show."""
        text = Text(f"{'index':>6} {'id':>7} {'label':>7}  text\n", "bold")
        for piece in pieces:
            if isinstance(piece, int):
                text.append(f"{'':>24}⋯ {piece:,} tokens ⋯\n", "italic cyan")
                continue
            label = "-" if piece.label is None else str(piece.label)
            said = visible(piece.text).replace("\n", "⏎")
            said = f"«{said}»" if piece.special else said
            said = f"⟦{said}⟧" if piece.supervised else f"'{said}'"
            text.append(f"{piece.index:>6} {piece.id:>7} {label:>7}  ")
            text.append(" … of the same character\n" if piece.joins else f"{said}\n", self._style(piece))
        text.rstrip()
        return text

    def _style(self, token: Token) -> str:
        if not self.colour:
            return ""
        return WRONG if token.label not in (None, token.id) else STYLES[token.special, token.supervised]
