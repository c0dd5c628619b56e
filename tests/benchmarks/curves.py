"""The loss of each step: ours beside the Trainer wired by hand, on the same rows in the same order.

    python curves.py [--steps 200] [--seq 128] [--batch 1] [--seeds 0,1,2] [--resume] [--svg docs/images/curves.svg]

The peer runs once with each seed, which is that of its adapter's first values alone; ours runs with the first seed. How far two
runs of the peer are apart is its noise; ours is to be no farther from the peer's run with the same seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import picture
from compare import Bench, demo_model_folder
from kept import Kept
from process import Reading
from settings import Setting

WINDOW = 10  # steps that a point of the picture is the mean of
IN_ORDER = "training.extra.train_sampling_strategy=sequential"


def measure(bench: Bench, setting: Setting, seeds: list[int], kept: Kept) -> dict[str, list[float]]:
    """Return the losses of each run, by its name."""
    runs: dict[str, Callable[[], Reading]] = {
        f"Trainer, seed {seed}": partial(bench.train_peer, "trainer", setting, bench.steps, ("--in-order", "--seed", str(seed)))
        for seed in seeds
    }
    runs["qlora-core"] = partial(bench.train_ours, setting, bench.steps, (IN_ORDER, f"training.seed={seeds[0]}"))
    found = {}
    for who, run in runs.items():
        found[who] = kept.reading(who, lambda run=run: run().report["losses"])
        print(f"{who}: ends at {found[who][-1]:.4f}", flush=True)
    return found


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the root of the mean squared difference of two curves, nats per token."""
    return math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def smooth(losses: Sequence[float]) -> list[tuple[float, float]]:
    """Return (last step, mean loss) of each window."""
    groups = [losses[start : start + WINDOW] for start in range(0, len(losses), WINDOW)]
    return [(WINDOW * number + len(group), statistics.fmean(group)) for number, group in enumerate(groups)]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--model", type=Path, help="a folder; the model of `qlora demo` by default")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--json", type=Path, default=Path("build/curves.json"))
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON file has")
    parser.add_argument("--svg", type=Path, help="where to draw it, such as docs/images/curves.svg")
    options = parser.parse_args()
    model = options.model or demo_model_folder()
    bench = Bench(model, options.scratch.absolute(), None, options.steps, [])
    setting = Setting("curves", "", seq=options.seq, batch=options.batch)
    work = f"{model.name}, {options.steps} steps of {options.batch} x {options.seq} tokens"
    kept = Kept(options.json, work, resume=options.resume)
    found = measure(bench, setting, [int(seed) for seed in options.seeds.split(",")], kept)
    ours, peers = found["qlora-core"], [losses for name, losses in found.items() if name != "qlora-core"]
    noise = [apart(a, b) for a, b in itertools.combinations(peers, 2)]
    away = apart(ours, peers[0])
    print(f"two runs of the peer are {min(noise):.4f} to {max(noise):.4f} nats apart")
    print(f"ours is {away:.6f} from that with the same seed: {'met' if away <= min(noise) else 'not met'}")
    if options.svg:
        title = f"Loss of {options.steps} steps of {options.batch} x {options.seq} tokens, mean of {WINDOW} steps"
        curves = {name: smooth(losses) for name, losses in found.items()}
        options.svg.write_text(picture.lines(title, "step", "nats per token", curves), encoding="utf-8")


if __name__ == "__main__":
    main()
