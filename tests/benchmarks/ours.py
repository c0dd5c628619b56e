"""The same work as in peers.py, through the public way of qlora_core: a configuration, resolved and executed.

    python ours.py train    --model DIR --rows FILE --output RUN [--seq 512] [--batch 2] [--steps 8] [--set KEY=VALUE]...
    python ours.py evaluate --output RUN --rows FILE [--seq 512] [--batch 2]
    python ours.py generate --output RUN [--tokens 64]

`--set` overrides anything in the configuration, as `qlora train --set` does: `--set training.gradient_checkpointing=true`,
`--set kernels=reference`. `evaluate` and `generate` read the finished run that `train` left. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from qlora_core import (
    DataConfig,
    Registry,
    RunConfig,
    SavedRun,
    encode_split,
    evaluate,
    execute,
    generate,
    resolve,
)

PROMPT = "The import statement"


def configuration(options: argparse.Namespace) -> RunConfig:
    """Return the configuration of the run; what is not named here is the default of the project."""
    return RunConfig.parse(
        {
            "model": options.model,
            "quantizer": {"name": "nf4", "double_quant": True},
            "adapter": {"name": "lora", "r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
            "dataset": {"name": "records", "path": str(options.rows), "format": "tokenized"},
            "data": {"sequence_length": options.seq, "eval_fraction": 0},
            "kernels": "auto",
            "callbacks": [],
            "training": {
                "max_steps": options.steps,
                "batch_size": options.batch,
                "learning_rate": 2e-4,
                "scheduler": "constant",
                "warmup": 0,
                "logging_steps": 1,
            },
            "output": options.output,
        },
        options.overrides,
    )


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the clock saw of a run, and which kernels the run took."""
    config, parts = resolve(configuration(options), Registry())
    from clock import Clock  # after the configuration is checked: it imports transformers

    clock = Clock()
    finished = execute(config, parts, plain_callbacks=[clock], overwrite=True, quiet=True)
    provenance = json.loads((finished.run.folder / "provenance.json").read_text(encoding="utf-8"))
    return {**clock.report(), "providers": provenance.get("providers"), "overrides": options.overrides}


def adapted(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the adapted model and the tokenizer of a finished run, as `qlora eval` and `qlora generate` get them."""
    saved = SavedRun.open(options.output, Registry())
    return saved.apply_kernels(saved.add_adapter(saved.load_base())), saved.load_tokenizer()


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of evaluating all rows, after a batch to warm up."""
    model, tokenizer = adapted(options)
    from qlora_records import Records

    data = DataConfig(sequence_length=options.seq, eval_fraction=0)
    blocks = encode_split(Records(path=str(options.rows), format="tokenized"), "train", tokenizer, data)
    assert blocks is not None
    evaluate(model, blocks.select(range(options.batch)), batch_size=options.batch)
    started = time.monotonic()
    result = evaluate(model, blocks, batch_size=options.batch)
    return {"seconds": time.monotonic() - started, "tokens": blocks.tokens, "loss": result.loss}


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of writing tokens greedily with the adapted model, after some to warm up."""
    model, tokenizer = adapted(options)
    generate(model, tokenizer, PROMPT, max_new_tokens=4)
    started = time.monotonic()
    text = generate(model, tokenizer, PROMPT, max_new_tokens=options.tokens)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"]), "text": text}


def main() -> None:
    """Do the work and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["train", "evaluate", "generate"])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    print(json.dumps({"train": train, "evaluate": score, "generate": write}[options.work](options)))


if __name__ == "__main__":
    main()
