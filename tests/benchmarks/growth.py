"""How memory grows with the length of a sequence, with gradient checkpointing: ours, and the Trainer wired by hand.

    python growth.py [--lengths 1024,2048,4096,8192] [--peer-until 8192] [--resume] [--svg docs/images/memory.svg]

One sequence per step, three steps, each length in a process of its own. Linear growth means that the bytes per further token
stay the same from one length to the next; they are printed. A peer that fails, for want of memory, is left out from there on.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import picture
from compare import Bench, demo_model_folder
from kept import Kept
from process import ChildError
from settings import Setting
from verdict import figures

STEPS = 3
NAMES = {"ours": "qlora-core", "trainer": "Trainer by hand"}

Peaks = dict[str, dict[int, dict[str, Any]]]


def measure(bench: Bench, lengths: list[int], peer_until: int, kept: Kept) -> Peaks:
    """Return the figures by who and length."""
    found: Peaks = {"ours": {}, "trainer": {}}
    for length in lengths:
        setting = Setting(f"growth-{length}", "", seq=length, batch=1, checkpointing=True)
        runs = {"ours": partial(bench.train_ours, setting, STEPS)}
        if length <= peer_until:
            runs["trainer"] = partial(bench.train_peer, "trainer", setting, STEPS)
        for who, run in runs.items():
            name = f"{length:,} tokens, {NAMES[who]}"
            try:
                one = kept.reading(name, lambda setting=setting, run=run: figures(setting, run()))
            except ChildError as error:
                if who == "ours":
                    raise
                print(f"{name}: fails: {str(error).splitlines()[-1]}", flush=True)
                peer_until = 0
                continue
            found[who][length] = one
            print(f"{name}: {one['peak'] / 1e9:.2f} GB, {one['rate']:,.0f} tokens/s", flush=True)
    return found


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
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON file has")
    parser.add_argument("--svg", type=Path, help="where to draw it, such as docs/images/memory.svg")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for ours")
    options = parser.parse_args()
    model = options.model or demo_model_folder()
    bench = Bench(model, options.scratch.absolute(), None, STEPS, options.overrides)
    kept = Kept(options.json, f"{model.name}, {' '.join(options.overrides)}", resume=options.resume)
    found = measure(bench, [int(length) for length in options.lengths.split(",")], options.peer_until, kept)
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
