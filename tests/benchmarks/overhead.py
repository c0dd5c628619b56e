"""What our frame costs per training step beyond the plain Hugging Face Trainer.

    python tests/benchmarks/overhead.py [--steps 60] [--rounds 5] [--json FILE]

The two train the same adapted model on the same blocks in turn, in one process. The model is tiny, so that a step is little
but the frame and a difference of a tenth of a millisecond shows; the difference is then set against a step of the real
SmolLM2-135M (NF4, LoRA r=16 on all linear layers, 2 x 512 tokens), measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers.trainer_callback import PrinterCallback

from qlora_bitsandbytes import NF4
from qlora_core import RunConfig, inject_adapter, load_model, load_tokenizer
from qlora_core.data.blocks import Blocks
from qlora_core.data.collate import Collator
from qlora_core.data.encode import Encoded
from qlora_core.demo_model import demo_model
from qlora_core.libraries import import_libraries
from qlora_core.run import Run
from qlora_core.training.arguments import training_arguments
from qlora_core.training.trainer import QLoRATrainer
from qlora_peft import LoRA


class StepClock(transformers.TrainerCallback):
    """Keeps the seconds from the end of one step to the end of the next, logging included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(steps[2:])


def tiny_model(folder: Path) -> Path:
    """Write a Llama with one layer of 32 dimensions, with the demo's tokenizer."""
    tokenizer = load_tokenizer(demo_model().path)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trainer(kind: str, model: Any, tokenizer: Any, blocks: Blocks, steps: int, folder: Path, clock: Any) -> Any:
    """Return our trainer or the plain one, with the same arguments."""
    settings = {"max_steps": steps, "logging_steps": 1, "save_steps": 10_000}
    parsed = RunConfig.parse({"model": "m", "dataset": "text", "output": str(folder / kind), "training": settings})
    arguments = training_arguments(parsed.training, output=folder / kind, evaluates=False)
    if kind == "ours":
        run = Run(folder / kind, parsed)
        run.create()
        return QLoRATrainer(model, tokenizer, Encoded(blocks, None, ""), arguments, run, [clock])
    arguments.save_strategy = "no"
    plain = transformers.Trainer(model=model, args=arguments, train_dataset=blocks, data_collator=Collator(), callbacks=[clock])
    plain.remove_callback(PrinterCallback)
    return plain


def step_seconds(kind: str, model: Any, tokenizer: Any, blocks: Blocks, steps: int) -> float:
    """Return the median seconds of a step of *kind*, the last one, with its checkpoint, left out."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer(kind, model, tokenizer, blocks, steps, Path(folder), clock).train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import_libraries()

    with tempfile.TemporaryDirectory() as folder:
        path = tiny_model(Path(folder))
        tokenizer = load_tokenizer(str(path))
        blocks = Blocks(datasets.Dataset.from_dict({"input_ids": [list(range(8))] * 64}))
        model = inject_adapter(load_model(str(path), NF4()), LoRA(r=2))
        rounds = [
            {kind: step_seconds(kind, model, tokenizer, blocks, options.steps) for kind in ("ours", "plain")}
            for _ in range(options.rounds)
        ]
    real = inject_adapter(load_model(demo_model().path, NF4()), LoRA(r=16))
    long = Blocks(datasets.Dataset.from_dict({"input_ids": [list(range(512))] * 16}))
    step = step_seconds("plain", real, tokenizer, long, 8)

    extra = statistics.median(r["ours"] - r["plain"] for r in rounds)
    report = {
        "tiny_step_ms": {k: round(1e3 * statistics.median(r[k] for r in rounds), 3) for k in ("ours", "plain")},
        "extra_ms_per_step": round(1e3 * extra, 3),
        "extra_ms_of_each_round": [round(1e3 * (r["ours"] - r["plain"]), 3) for r in rounds],
        "real_step_ms": round(1e3 * step, 1),
        "overhead_percent": round(100 * extra / step, 4),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
