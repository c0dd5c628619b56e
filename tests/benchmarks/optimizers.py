"""What an optimizer keeps and how long its step takes, for the adapter of the demo's model: nothing else is trained in QLoRA.

    python optimizers.py [--names adamw_torch_fused,adamw_bnb_8bit] [--steps 20] [--json build/optimizers.json]

The names are those of `training.optimizer`. Each has a process of its own. Beside the bytes of its states stands what the
process grew by in its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import process
from compare import demo_model_folder
from machine import machine

NAMES = "adamw_torch_fused,adamw_torch,adamw_bnb_8bit,paged_adamw_8bit,adafactor,lion_8bit"


def measure(name: str, model: Path, steps: int) -> dict[str, float]:
    """Return seconds per step, and bytes of the parameters, of the states, and of the growth of anonymous memory."""
    import torch
    import transformers

    from qlora_core import ModelConfig, build_skeleton, inject_adapter
    from qlora_peft import LoRA

    skeleton = build_skeleton(ModelConfig(path=str(model)))
    shapes = [tuple(p.shape) for p in inject_adapter(skeleton, LoRA(r=16)).parameters() if p.requires_grad]
    torch.manual_seed(0)
    adapter = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, optim=name, use_cpu=not torch.cuda.is_available(), report_to=[])
        optimizer = transformers.Trainer(adapter, args).create_optimizer()
    for parameter in adapter:
        parameter.grad = torch.randn_like(parameter)
    seconds, before = [], process.memory(os.getpid())
    for _ in range(steps):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "seconds": statistics.median(seconds[2:]),
        "parameters": sum(p.nbytes for p in adapter),
        "states": sum(value.nbytes for value in states),
        "grown": process.memory(os.getpid()) - before,
    }


def main() -> None:
    """Measure each in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default=NAMES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", type=Path, help="a folder; the model of `qlora demo` by default")
    parser.add_argument("--json", type=Path, default=Path("build/optimizers.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or demo_model_folder()
    if options.one:
        print(json.dumps(measure(options.one, model, options.steps)))
        return
    found = {}
    for name in options.names.split(","):
        command = [sys.executable, __file__, "--one", name, "--model", str(model), "--steps", str(options.steps)]
        try:
            found[name] = process.run(command).report
        except process.ChildError as error:
            print(f"{name}: {str(error).strip().splitlines()[-1]}")
            continue
        seconds, states, grown = (found[name][key] for key in ("seconds", "states", "grown"))
        print(f"{name:20} {1e3 * seconds:7.1f} ms a step, states {states / 1e6:5.1f} MB, grown by {grown / 1e6:5.1f} MB")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine(), "optimizers": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
