"""Peers and ours in turn on the same work: speed and memory, medians and ratios.

    python compare.py [--only seq512,gsm8k] [--rounds 3] [--steps 8] [--quick] [--peers trainer] [--add]

Each run is a process of its own. In a round every setting is done once by the Trainer wired by hand, by TRL and by ours; the
table has the medians of all rounds, and the best peer of each line in its ratio. The model is that of `qlora demo`. GSM8K and
chats come from the folder in --data or $QLORA_BENCH_DATA (see workload.py) and are left out without it. What is not wanted by
--only or has failed stays in the JSON file from before; with --add so do the rounds of what is measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import process
import workload
from machine import machine, parameters
from rich.console import Console
from settings import PEERS, QUICK, SETTINGS, WHO, Setting, named
from verdict import Line, figures, lines, table

HERE = Path(__file__).parent
DISTURBED = 0.15  # cores taken by others from which a reading is remarked on; the watching itself takes some hundredths


class Bench:
    """Makes the runs of a comparison in the folder *scratch* and keeps what they give."""

    def __init__(self, model: Path, scratch: Path, data: Path | None, steps: int, overrides: list[str]) -> None:
        self.model, self.scratch, self.data, self.steps, self.overrides = model, scratch, data, steps, overrides
        self.environment = {"HF_DATASETS_CACHE": str(scratch / "datasets")}
        scratch.mkdir(parents=True, exist_ok=True)

    def script(self, name: str, *arguments: str) -> process.Reading:
        """Run one of the scripts beside this one."""
        return process.run([sys.executable, str(HERE / name), *arguments], self.environment)

    def rows(self, setting: Setting) -> Path:
        """Return the file with the rows of *setting*, made once."""
        count = setting.batch * (8 if setting.work == "evaluate" else self.steps)
        file = self.scratch / f"{setting.rows}-{setting.seq}{'' if setting.ragged else f'-{count}'}.jsonl"
        if not file.is_file():
            extra = ["--data", str(self.data)] if setting.ragged else ["--rows", str(count)]
            command = [str(HERE / "workload.py"), setting.rows, str(file), "--model", str(self.model)]
            process.call([sys.executable, *command, "--seq", str(setting.seq), *extra], self.environment)
        return file

    def adapted(self) -> Path:
        """Return the folder of a finished run of ours, made once, whose adapter is evaluated and generates."""
        setting = Setting("adapted", "", seq=128)
        folder = self.scratch / "runs" / setting.name
        if not (folder / "adapter").is_dir():
            self.train_ours(setting, steps=2)
        return folder

    def train_ours(self, setting: Setting, steps: int, overrides: tuple[str, ...] = ()) -> process.Reading:
        """Return the reading of a run of ours, left in runs/NAME."""
        chosen = [*self.overrides, *overrides]
        if setting.checkpointing:
            chosen.insert(0, "training.gradient_checkpointing=true")
        folder = self.scratch / "runs" / setting.name
        arguments = ["train", "--model", str(self.model), "--rows", str(self.rows(setting)), "--output", str(folder)]
        arguments += ["--seq", str(setting.seq), "--batch", str(setting.batch), "--steps", str(steps)]
        return self.script("ours.py", *arguments, *(word for value in chosen for word in ("--set", value)))

    def train_peer(self, peer: str, setting: Setting, steps: int, more: tuple[str, ...] = ()) -> process.Reading:
        """Return the reading of a run of *peer*, with *more* arguments."""
        arguments = ["train", peer, "--model", str(self.model), "--rows", str(self.rows(setting)), "--steps", str(steps)]
        arguments += ["--batch", str(setting.peer_batch or setting.batch)]
        return self.script("peers.py", *arguments, *(["--checkpointing"] if setting.checkpointing else []), *more)

    def read(self, who: str, setting: Setting) -> dict[str, Any] | None:
        """Return the figures of *who* in *setting*; None where it does no such work."""
        steps = 1 if setting.work == "startup" else self.steps
        if setting.work in ("train", "startup"):
            reading = self.train_ours(setting, steps) if who == "ours" else self.train_peer(who, setting, steps)
            return figures(setting, reading)
        if setting.work == "generate" and who == "trl":
            return None  # generates as the other peer does, by transformers and PEFT
        arguments = [] if setting.work == "generate" else ["--rows", str(self.rows(setting)), "--batch", str(setting.batch)]
        if who == "ours":
            where = ["--output", str(self.adapted()), "--seq", str(setting.seq)]
            return figures(setting, self.script("ours.py", setting.work, *where, *arguments))
        return figures(setting, self.script("peers.py", setting.work, who, "--model", str(self.model), *arguments))

    def matmul(self) -> dict[str, Any]:
        """Return the measured rates of matrix multiplication, FLOP/s."""
        return self.script("matmul.py").report


def measure(bench: Bench, setting: Setting, rounds: int, who_runs: Sequence[str], console: Console) -> dict[str, Any]:
    """Return the readings of all rounds of *setting*, in turn, and the rates of matrix multiplication beside them."""
    readings: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    rates = []
    if setting.work == "startup":
        for who in who_runs:
            bench.read(who, setting)  # so that every cache is warm
    for number in range(rounds):
        turn = number % len(who_runs)
        for who in (*who_runs[turn:], *who_runs[:turn]):
            console.print(f"{setting.name}, round {number + 1} of {rounds}: {who}", style="dim")
            found = bench.read(who, setting)
            if found is None:
                continue
            readings[who].append(found)
            if found["others"] > DISTURBED:
                console.print(f"  other processes took {found['others']:.1f} cores meanwhile", style="yellow")
        if setting.bound is not None:
            rates.append(bench.matmul())
    return {"setting": dataclasses.asdict(setting), "readings": readings, "matmul": rates}


def added(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what `measure` gave *before* and *now* as one."""
    readings = {who: [*before["readings"].get(who, []), *runs] for who, runs in now["readings"].items()}
    return {**now, "readings": readings, "matmul": [*before["matmul"], *now["matmul"]]}


def judged(setting: Setting, measured: dict[str, Any], count: int) -> list[Line]:
    """Return the lines of *setting*; the bound is what the best product of each round allows, the median of the rounds."""
    rates = [rate["best"] for rate in measured["matmul"]]
    bound = statistics.median(rates) / setting.flop_per_token(count) if rates else None
    readings = {who: runs for who, runs in measured["readings"].items() if runs}
    return lines(setting, readings, bound=bound)


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"names of {', '.join(s.name for s in SETTINGS)}, separated by commas")
    parser.add_argument("--quick", action="store_true", help=f"one round, 5 steps, and only {', '.join(QUICK)} unless --only")
    parser.add_argument("--rounds", type=int, help="3 unless --quick")
    parser.add_argument("--steps", type=int, help="8 unless --quick; the first two are not measured")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"which of {', '.join(PEERS)} run, separated by commas")
    parser.add_argument("--add", action="store_true", help="keep the rounds that the JSON file has of these settings")
    parser.add_argument("--model", type=Path, help="a folder; the model of `qlora demo` by default")
    parser.add_argument("--data", type=Path, default=os.environ.get("QLORA_BENCH_DATA"))
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"), help="for token rows, runs and caches")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for ours")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.steps = options.steps or (5 if options.quick else 8)
    options.peers = options.peers.split(",")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {min(unknown)!r}; known: {', '.join(PEERS)}")
    if not Path("/proc/self/status").is_file():
        parser.error("memory is read from /proc, which only Linux has")
    try:
        options.settings = named(options.only) if options.only else named(",".join(QUICK)) if options.quick else SETTINGS
    except ValueError as error:
        parser.error(str(error))
    return options


def demo_model_folder() -> Path:
    """Return the folder of the demo's model, got in a process of its own: this one stays small."""
    code = "import json; from qlora_core.demo_model import demo_model; print(json.dumps({'path': demo_model().path}))"
    return Path(process.run([sys.executable, "-c", code]).report["path"])


def main() -> None:
    """Compare, print the table, write the JSON file."""
    options = parsed()
    console = Console()
    model = options.model or demo_model_folder()
    bench = Bench(model, options.scratch.absolute(), options.data, options.steps, options.overrides)
    before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
    count = parameters(model)
    settings = before.get("settings", {})
    shown: list[Line] = []
    failed: list[str] = []
    for setting in options.settings:
        if setting.ragged and workload.find(setting.rows, options.data) is None:
            console.print(f"{setting.name}: left out, no {workload.FILES[setting.rows]} in --data or $QLORA_BENCH_DATA")
            continue
        try:
            measured = measure(bench, setting, options.rounds, (*options.peers, "ours"), console)
        except process.ChildError as error:
            console.print(f"{setting.name}: left out, it failed: {error}", markup=False)
            failed.append(setting.name)
            continue
        if options.add and setting.name in settings:
            measured = added(settings[setting.name], measured)
        found = judged(setting, measured, count)
        shown += found
        settings[setting.name] = {**measured, "machine": machine(), "lines": [dataclasses.asdict(line) for line in found]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"model": model.name, "parameters": count, "settings": settings}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    wide = console if console.is_terminal else Console(width=150)
    facts = machine()
    wide.print(
        table(shown, f"{model.name}, {facts['processor']}, {facts['cores']} cores; ratio to the best of {' and '.join(PEERS)}")
    )
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
