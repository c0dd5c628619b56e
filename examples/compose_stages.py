"""A fine-tuning put together from its stages, each a plain function: look at the model between any two of them.

python examples/compose_stages.py --text corpus.txt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import transformers

from qlora_bitsandbytes import NF4
from qlora_core import (
    DataConfig,
    Run,
    RunConfig,
    build_skeleton,
    encode,
    evaluate,
    generate,
    inject_adapter,
    load_model,
    load_tokenizer,
    train,
)
from qlora_core.demo_model import demo_model, demo_text
from qlora_peft import LoRA
from qlora_text import TextFile


def main(model: str | None = None, text: str | None = None, steps: int = 20, output: str | None = None) -> dict[str, float]:
    path, text = model or demo_model().path, text or str(demo_text())
    quantizer, adapter, dataset = NF4(), LoRA(r=16, alpha=32), TextFile(path=text)

    # 1. The text becomes blocks of token ids; the last tenth of them is held out.
    tokenizer = load_tokenizer(path)
    encoded = encode(dataset, tokenizer, DataConfig(sequence_length=128, eval_fraction=0.1))
    print(f"{len(encoded.train)} blocks to train on, {len(encoded.eval)} held out")

    # 2. The model without weights: every name and shape, to refuse early what can't work.
    skeleton = build_skeleton(path)
    adapter.check_model(skeleton)

    # 3. The weights, in 4 bits as they are read; frozen.
    transformers.set_seed(0)
    base = load_model(path, quantizer, skeleton=skeleton)
    before = evaluate(base, encoded.eval)

    # 4. The adapter, the only thing that is trained.
    adapted = inject_adapter(base, adapter)

    # 5. The Hugging Face Trainer, writing metrics and checkpoints into the run's folder.
    folder = output or tempfile.mkdtemp(prefix="qlora-")
    config = RunConfig.parse(
        {
            "model": path,
            "dataset": {"name": "text", "path": text},
            "training": {"max_steps": steps, "learning_rate": 1e-3, "logging_steps": 5},
            "output": folder,
        }
    )
    run = Run(Path(folder), config)
    run.create()
    train(adapted, tokenizer, encoded, run)

    # 6. What it was good for.
    after = evaluate(adapted, encoded.eval)
    print(f"perplexity of the held-out blocks {before.perplexity:.2f} -> {after.perplexity:.2f}")
    print(generate(adapted, tokenizer, "The import statement", max_new_tokens=24))
    run.write_adapter(lambda target: adapter.save(adapted, target))
    print(f"adapter saved in {run.adapter}")
    return {"before": before.perplexity, "after": after.perplexity}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id; by default the model of `qlora demo`")
    parser.add_argument("--text", help="a text file; by default Python's documentation")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--output", help="the run's folder; by default a temporary one")
    main(**vars(parser.parse_args()))
