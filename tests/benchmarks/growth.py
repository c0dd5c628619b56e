"""How memory grows with the length of a sequence, with gradient checkpointing: ours, and the Trainer wired by hand.

    python growth.py [--lengths 1024,2048,4096,8192] [--peer-until 8192] [--svg docs/images/memory.svg]

One sequence per step, three steps, each length in a process of its own; what was cut off goes on where it was. Linear growth
means that the bytes per further token stay the same from one length to the next; they are printed. A peer that fails, for want
of memory, is left out from there on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import picture
from compare import Bench, demo_model_folder
from machine import machine
from process import ChildError
from settings import Setting
from verdict import figures

STEPS = 3
NAMES = {"ours": "qlora-core", "trainer": "Trainer by hand"}

Peaks = dict[str, dict[int, dict[str, Any]]]


def measure(bench: Bench, lengths: list[int], peer_until: int, file: Path) -> Peaks:
    """Return the figures by who and length. Each is written to *file* at once; what that has is not measured again."""
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if report.get("model") != bench.model.name:
        report = {"machine": machine(), "model": bench.model.name, "runs": {"ours": {}, "trainer": {}}}
    file.parent.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        setting = Setting(f"growth-{length}", "", seq=length, batch=1, checkpointing=True)
        runs = {"ours": partial(bench.train_ours, setting, STEPS)}
        if length <= peer_until:
            runs["trainer"] = partial(bench.train_peer, "trainer", setting, STEPS)
        for who, run in runs.items():
            known = report["runs"][who]
            try:
                known[str(length)] = known.get(str(length)) or figures(setting, run())
            except ChildError as error:
                if who == "ours":
                    raise
                print(f"{NAMES[who]} fails at {length}: {str(error).splitlines()[-1]}", flush=True)
                peer_until = 0
                continue
            file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            peak, rate = known[str(length)]["peak"], known[str(length)]["rate"]
            print(f"{length:6,} tokens, {NAMES[who]}: {peak / 1e9:.2f} GB, {rate:,.0f} tokens/s", flush=True)
    return {who: {int(length): run for length, run in runs.items()} for who, runs in report["runs"].items()}


def slopes(peaks: dict[int, float]) -> list[float]:
    """Return the bytes per further token from each length to the next."""
    return [(peaks[b] - peaks[a]) / (b - a) for a, b in itertools.pairwise(sorted(peaks))]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--peer-until", type=int, default=8192)
    parser.add_argument("--model", type=Path, help="a folder; the model of `qlora demo` by default")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--json", type=Path, default=Path("build/growth.json"))
    parser.add_argument("--svg", type=Path, help="where to draw it, such as docs/images/memory.svg")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for ours")
    options = parser.parse_args()
    model = options.model or demo_model_folder()
    bench = Bench(model, options.scratch.absolute(), None, STEPS, options.overrides)
    found = measure(bench, [int(length) for length in options.lengths.split(",")], options.peer_until, options.json)
    peaks = {who: {length: run["peak"] for length, run in runs.items()} for who, runs in found.items() if runs}
    for who, of in peaks.items():
        each = ", ".join(f"{slope / 1e3:,.0f}" for slope in slopes(of))
        print(f"{NAMES[who]}: {each} kB per further token, from each length to the next")
    if options.svg:
        series = {NAMES[who]: [(length, peak / 1e9) for length, peak in of.items()] for who, of in peaks.items()}
        title = "Peak memory of a training step with gradient checkpointing"
        options.svg.write_text(picture.lines(title, "tokens in the sequence", "GB", series), encoding="utf-8")


if __name__ == "__main__":
    main()
