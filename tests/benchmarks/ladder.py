"""What each technique brings: one more on every rung, with the speed and the memory measured there.

    python ladder.py [--seq 512] [--batch 2] [--rounds 1] [--json build/ladder.json] [--svg docs/images/ladder.svg]

Every rung keeps what those below it set. The rungs are done in turn, round by round, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import picture
from compare import Bench, demo_model_folder
from machine import machine
from process import ChildError
from settings import Setting
from verdict import figures

PARTS = ("linear", "attention", "mlp", "norm", "rotary", "compiled", "loss", "keep_pages", "tiles")
OFF = "kernels={name: fused, " + ", ".join(f"{part}: false" for part in PARTS) + "}"


@dataclass(frozen=True)
class Rung:
    """A step of the ladder."""

    label: str
    sets: tuple[str, ...] = ()
    """What it adds to the configuration, as `--set` takes it."""
    peer: str | None = None


LADDER = (
    Rung("Trainer by hand", peer="trainer"),
    Rung("qlora-core, plain kernels", ("kernels=reference",)),
    Rung("+ 4-bit linear layers", (OFF, "kernels.linear=true")),
    Rung("+ attention in blocks", ("kernels.attention=true",)),
    Rung("+ MLP", ("kernels.mlp=true",)),
    Rung("+ norms, float32 residuals", ("kernels.norm=true",)),
    Rung("+ rotary positions", ("kernels.rotary=true",)),
    Rung("+ compiled loops", ("kernels.compiled=true",)),
    Rung("+ losses in a loop", ("kernels.loss=true",)),
    Rung("+ pages kept", ("kernels.keep_pages=true",)),
    Rung("+ products by tiles", ("kernels.tiles=true",)),
    Rung("+ full checkpointing", ("training.gradient_checkpointing=true",)),
)


def climb(rungs: tuple[Rung, ...]) -> list[tuple[Rung, tuple[str, ...]]]:
    """Return each rung with all that is set on it."""
    return [(rung, tuple(one for below in rungs[: index + 1] for one in below.sets)) for index, rung in enumerate(rungs)]


def measure(bench: Bench, setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Return the readings of each rung; one that fails has none, and says why."""
    found: list[dict[str, Any]] = [{"label": rung.label, "sets": sets, "runs": []} for rung, sets in climb(LADDER)]
    for _ in range(rounds):
        for rung, entry in zip(LADDER, found, strict=True):
            try:
                if rung.peer:
                    reading = bench.train_peer(rung.peer, setting, bench.steps)
                else:
                    reading = bench.train_ours(setting, bench.steps, entry["sets"])
            except ChildError as error:
                entry["error"] = str(error).strip().splitlines()[-1]
                print(f"{rung.label}: {entry['error']}")
                continue
            entry["runs"].append(run := figures(setting, reading))
            print(f"{rung.label}: {run['rate']:,.0f} tokens/s, {run['peak'] / 1e9:.2f} GB")
    return found


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", type=Path, help="a folder; the model of `qlora demo` by default")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--json", type=Path, default=Path("build/ladder.json"))
    parser.add_argument("--svg", type=Path, help="where to draw it, such as docs/images/ladder.svg")
    options = parser.parse_args()
    model = options.model or demo_model_folder()
    bench = Bench(model, options.scratch.absolute(), None, options.steps, [])
    found = measure(bench, Setting("ladder", "", seq=options.seq, batch=options.batch), options.rounds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "model": model.name, "seq": options.seq, "batch": options.batch, "rungs": found}
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    measured = [entry for entry in found if entry["runs"]]
    if options.svg and measured:
        panels = {
            "tokens/s": [statistics.median(run["rate"] for run in entry["runs"]) for entry in measured],
            "peak memory, GB": [statistics.median(run["peak"] for run in entry["runs"]) / 1e9 for entry in measured],
        }
        title = f"What each technique brings: {model.name[:12]}, {options.batch} x {options.seq} tokens"
        options.svg.write_text(picture.bars(title, [entry["label"] for entry in measured], panels), encoding="utf-8")


if __name__ == "__main__":
    main()
