"""Kill a run at random moments, resume it each time, and compare what it ends in with a run that was never killed.

    python tests/soak.py --model DIR --text FILE [--kills 50] [--seed 0] [--moments] [--set KEY=VALUE]...

With --moments it is also killed once at each of MOMENTS, which a random one seldom meets. The processes are forks of this one,
which has imported the libraries and has no threads yet; each is killed by SIGKILL after a time that is drawn from the seconds
that the whole run takes. A run that gets to its end is compared, and another begins, until there were as many kills as asked
for. Compared are the adapter and the checkpoints that are left, byte by byte, and the lines of metrics.jsonl but for what the
clock and the memory give. Prints one JSON object; exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from qlora_core import Registry, RunConfig, execute, resolve
from qlora_core.libraries import import_libraries
from qlora_core.run import Run

READINGS = ("tokens_per_second", "peak_memory_bytes", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
SETTINGS: dict[str, Any] = {
    "quantizer": "nf4",
    "adapter": {"name": "lora", "r": 4, "dropout": 0.1},
    "callbacks": [],
    "data": {"sequence_length": 32, "eval_fraction": 0.05},
    # epochs and intervals that divide nothing, so that a kill falls between all of them
    "training": {
        "epochs": 2.0,
        "batch_size": 3,
        "gradient_accumulation": 2,
        "learning_rate": 1e-3,
        "seed": 3,
        "logging_steps": 3,
        "eval_steps": 7,
        "save_steps": 5,
        "save_total_limit": 2,
    },
}


def die(*arguments: Any, **options: Any) -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def tear(run: Run, line: Any) -> None:
    """Write the beginning of a line of metrics.jsonl."""
    with run.metrics.open("ab", buffering=0) as file:
        file.write(b'{"st')
    die()


MOMENTS: dict[str, tuple[str, str, Any]] = {
    "between the files of a checkpoint": ("qlora_core.training.checkpoint", "save_tree", die),
    "before a checkpoint is sealed": ("qlora_core.run", "seal", die),
    "before the folder of a checkpoint is flushed": ("qlora_core.run", "flush", die),
    "before old checkpoints are deleted": ("qlora_core.run:Run", "rotate_checkpoints", die),
    "in an evaluation": ("qlora_core.training.trainer", "score", die),
    "before the adapter is written": ("qlora_core.run:Run", "write_adapter", die),
    "within a line of the log": ("qlora_core.run:Run", "append_metrics", tear),
}
"""Names, in what they are looked up, and what is called instead from the fifth batch on."""


def arm(moment: str) -> None:
    """Have this process die at *moment*."""
    from qlora_core.training.trainer import QLoRATrainer

    place, name, instead = MOMENTS[moment]
    module, _, inner = place.partition(":")
    owner = sys.modules[module] if not inner else getattr(sys.modules[module], inner)
    step, batches = QLoRATrainer.training_step, iter(range(5))

    def training_step(self: Any, *arguments: Any) -> Any:
        if next(batches, None) is None:
            setattr(owner, name, instead)
        return step(self, *arguments)

    QLoRATrainer.training_step = training_step  # type: ignore[method-assign]


def work(config: RunConfig, folder: Path) -> None:
    """Begin the run in *folder*, or go on with it, in this process."""
    torch.set_num_threads(1)
    run = Run(folder, config)
    resume = bool(run.checkpoints())
    execute(*resolve(config, Registry()), resume=resume, overwrite=not resume and Run.holds_a_run(folder))


def attempt(config: RunConfig, folder: Path, seconds: float | None, moment: str = "") -> bool:
    """Let a process work for *seconds* (None: to its end, or the *moment*) and kill it; return whether it was done before."""
    child = os.fork()
    if child == 0:
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            if moment:
                arm(moment)
            work(config, folder)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if moment and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                return False
            if os.waitstatus_to_exitcode(status) != 0:
                sys.exit(f"a process ended with {os.waitstatus_to_exitcode(status)}; see above")
            return True
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def result(folder: Path) -> dict[str, Any]:
    """Return what a finished run is compared by."""
    files = [folder / "adapter" / "adapter_model.safetensors", *sorted((folder / "checkpoints").glob("step-*/*"))]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": {str(file.relative_to(folder)): content(file) for file in files if file.name != "manifest.json"},
        "metrics": [timeless(line) for line in lines],
    }


def content(file: Path) -> Any:
    """Return what *file* holds, without the readings that the Trainer keeps of its log."""
    if file.name != "trainer_state.json":
        return file.read_bytes()
    state = json.loads(file.read_text().replace(str(file.parents[2]), "RUN"))
    state["log_history"] = [timeless(line) for line in state["log_history"]]
    if "epoch" not in (file.parents[2] / "metrics.jsonl").read_text():  # a stream has none; the Trainer counts on
        for line in (state, *state["log_history"]):
            line.pop("epoch", None)
    return state


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """Return *line* without what the clock and the memory gave."""
    return {key: value for key, value in line.items() if key not in READINGS}


def differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    files = [name for name in {*wanted["files"], *got["files"]} if wanted["files"].get(name) != got["files"].get(name)]
    named = [f"{name}: {_inner(wanted['files'].get(name), got['files'].get(name))}" for name in sorted(files)]
    return named + ([] if wanted["metrics"] == got["metrics"] else ["metrics.jsonl"])


def _inner(one: Any, other: Any) -> str:
    """Return the keys that differ, for JSON."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return f"{len(one or b'')} and {len(other or b'')} bytes"
    return ", ".join(key for key in {*one, *other} if one.get(key) != other.get(key))


def soak(
    settings: dict[str, Any], overrides: list[str], scratch: Path, kills: int, seed: int, chosen: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the figures of a soak: kills, runs, seconds of the whole run, and what differed."""
    configs = {name: RunConfig.parse({**settings, "output": str(scratch / name)}, overrides) for name in ("whole", "killed")}
    attempt(configs["whole"], scratch / "whole", None)  # fills the caches
    shutil.rmtree(scratch / "whole")
    started = time.monotonic()
    attempt(configs["whole"], scratch / "whole", None)
    whole = time.monotonic() - started
    wanted, moments = result(scratch / "whole"), random.Random(seed)
    killed, runs, found = 0, 0, []
    for moment in chosen:
        if attempt(configs["killed"], scratch / "killed", None, moment):
            sys.exit(f"the run ended before it came to the moment {moment!r}")
        attempt(configs["killed"], scratch / "killed", None)
        found += [f"{moment}: {name}" for name in differences(wanted, result(scratch / "killed"))]
        left = [str(path.relative_to(scratch)) for path in (scratch / "killed").rglob(".*")]
        found += [f"{moment}: {name} was left behind" for name in left]
        shutil.rmtree(scratch / "killed")
    while killed < kills:
        while not attempt(configs["killed"], scratch / "killed", moments.uniform(0, whole) if killed < kills else None):
            killed += 1
        runs += 1
        found += differences(wanted, result(scratch / "killed"))
        shutil.rmtree(scratch / "killed")
    return {
        "kills": killed,
        "runs": runs,
        "moments": list(chosen),
        "seconds": whole,
        "compared": sorted(wanted["files"]),
        "differences": found,
    }


def main() -> None:
    """Soak and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", action="store_true")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    import_libraries()
    # what a run imports late, so that each fork has it already
    import bitsandbytes
    import peft
    import transformers

    import qlora_core.training.trainer

    assert all((bitsandbytes, peft, transformers, qlora_core.training.trainer))
    gc.freeze()
    settings = {**SETTINGS, "model": options.model, "dataset": {"name": "text", "path": options.text}}
    with tempfile.TemporaryDirectory() as scratch:
        chosen = list(MOMENTS) if options.moments else []
        report = soak(settings, options.overrides, Path(scratch), options.kills, options.seed, chosen)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["differences"] else 0)


if __name__ == "__main__":
    main()
