"""Draw docs/images/demo.svg, the picture in the README, from what a real run of `qlora demo` left.

    qlora demo --json > report.json
    python docs/draw_demo.py runs/demo report.json

Every figure in the picture comes from the run's metrics.jsonl or from the report. The configuration is an excerpt.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qlora_core import RunConfig
from qlora_core.cli.demo import _show

EXCERPT = ("quantizer", "adapter", "data")


def draw(run: Path, report: dict[str, Any]) -> str:
    """Return the picture as SVG that fetches nothing from the network."""
    config = RunConfig.read(run / "config.yaml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    figures = (
        f"loss {last['loss']:.3f} · {last['tokens_per_second']:,.0f} tokens/s · peak {last['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    console = Console(record=True, width=100, force_terminal=True, highlight=False, file=io.StringIO())
    console.print("[bold green]$[/] make demo\n\n[bold]Configuration[/] (excerpt)")
    for section in EXCERPT:
        values = getattr(config, section).model_dump(mode="json")
        shown = {key: value for key, value in values.items() if value not in (None, [], "none", "default", False)}
        console.print(f"{section}: {json.dumps(shown)}".replace('"', ""), markup=False)
    columns = (TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TextColumn(figures))
    bar = Progress(*columns, console=console, auto_refresh=False)
    bar.add_task("training", total=last["step"], completed=last["step"])
    console.print()
    console.print(bar)
    console.print()
    _show(console, report)
    svg = console.export_svg(title="qlora demo", unique_id="demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder that the demo wrote")
    parser.add_argument("report", type=Path, help="what `qlora demo --json` printed")
    arguments = parser.parse_args()
    picture = draw(arguments.run, json.loads(arguments.report.read_text(encoding="utf-8")))
    (Path(__file__).parent / "images" / "demo.svg").write_text(picture, encoding="utf-8")
